"""Tiny tokenizers, models and data sets, made in a moment and offline."""

import importlib
import inspect
import json
import pkgutil
import socket
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CONFIGS = Path(__file__).parents[1] / "configs"
TEXT = ["the film was good and the plot was bad", "Review: a quiet, moving, slow story of one family"]
CHAT = (
    "{% for m in messages %}<bos>{{ m['role'] }}:{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_inner": 64},
}


def tiny_tokenizer(path, chat_template=False, pad=True):
    """A byte-level tokenizer of fewer than 400 tokens, saved into `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>", *(["<pad>"] if pad else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>" if pad else None
    )
    if chat_template:
        fast.chat_template = CHAT
    fast.save_pretrained(path)
    return fast


def tiny_model(path, tokenizer, kind="llama", layers=2, seed=0, **overrides):
    """A random causal language model with its tokenizer, saved into `path`."""
    torch.manual_seed(seed)
    sizes = {**SIZES.get(kind, SIZES["llama"]), **overrides}
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    return save_opinionated(AutoModelForCausalLM.from_config(config), tokenizer, path)


def save_opinionated(model, tokenizer, path):
    """Save a random model with its tokenizer, its weights larger than usual: it prefers some tokens to others."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tiny_preferences(path, count=24):
    """Pairs: the first response has 'good', the second 'bad'."""
    words = ["film", "plot", "story", "family", "cast", "end"]
    return write_jsonl(
        path,
        [
            {
                "prompt": f"Review {i}: the {words[i % 6]}",
                "chosen": " was good" + " and good" * (i % 3),
                "rejected": " was bad" + " and bad" * (i % 2),
            }
            for i in range(count)
        ],
    )


def tiny_prompts(path, count=16):
    return write_jsonl(path, [{"prompt": f"Review {i}: the film" + " was" * (i % 3)} for i in range(count)])


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def last(folder):
    """The last checkpoint of a run."""
    return folder / "checkpoints" / "last.ckpt"


def concrete_subclasses(package, base):
    """Every class below `base` that a module of `package` defines and that can be made."""
    found = []
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        for _, kind in inspect.getmembers(loaded, inspect.isclass):
            if issubclass(kind, base) and not inspect.isabstract(kind) and kind.__module__ == loaded.__name__:
                found.append(kind)
    return found


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
