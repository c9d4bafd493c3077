"""Tiny models in the shape of public reward models, and responses known by their texts alone."""

import helpers
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_vapo.rollout import Encoders, text_responses
from lit_vapo.types import Prompt

# As in ChatML: the turn ends with a line break after the token that stops the model.
CHATML = (
    "{% for m in messages %}<bos>{{ m['role'] }}\n{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
MESSAGES = [
    Prompt([{"role": "user", "content": text}]) for text in ("the film", "the plot was good and", "Review: a quiet")
]
TEXTS = ["good", "bad and slow", " a family of one story, quiet and moving"]


def classifier(path, labels=1, kind="llama", seed=0, template=CHATML, pad=True, pad_id=None, **overrides):
    """A random classifier with its tokenizer, saved into `path`.

    `pad`: whether the tokenizer has a token to pad with; `pad_id`: what the configuration says of it.
    """
    torch.manual_seed(seed)
    tokenizer = helpers.tiny_tokenizer(path, pad=pad)
    tokenizer.chat_template = template
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_labels=labels,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id if pad_id is None else pad_id,
        **{"max_position_embeddings": 256, **helpers.SIZES.get(kind, {}), **overrides},
    )
    return helpers.save_opinionated(AutoModelForSequenceClassification.from_config(config), tokenizer, path)


def responses(prompts=None, texts=None, finished=None, device="cpu"):
    """Responses of which the texts alone are known."""
    prompts = MESSAGES if prompts is None else [Prompt(p) if isinstance(p, str) else p for p in prompts]
    texts = list(TEXTS if texts is None else texts)
    return text_responses(prompts, texts, finished or [True] * len(texts), Encoders(), device)
