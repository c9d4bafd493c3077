"""Everything the tiny studies start from: a tokenizer, a language model trained from scratch, prompts, a true reward.

    python -m examples.tiny.prepare --output runs/tiny_lm

The reviews come with an installed package, and nothing is fetched. What exists is kept, so a second run takes a
moment.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.sentiment.corpus import Review, read_reviews, split_position
from examples.sentiment.prepare import once, write_rows
from lit_vapo.cli import main
from lit_vapo.data.encoder import Encoder
from lit_vapo.folders import claim_folder
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.study.experiments.reference_responses import feature_model, reference_responses
from lit_vapo.study.experiments.truth import PromptValues, TrueReward
from lit_vapo.types import Prompt, TokenSequence

SFT = Path(__file__).parents[2] / "configs" / "sft" / "study.yaml"
# Nobody reads further: the language model sees 24 tokens. Short prompts make small batches.
OPENING_WORDS, LEAST_WORDS, MOST_WORDS = 3, 8, 24
MOST_LETTERS = 20
RESPONSE_TOKENS = 6
TIMES = 64  # responses to each prompt, to know what the reference earns there
# Shares of the texts by hash: to train the language model and the true reward on, and to open prompts with.
TRAIN = 0.8


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def halves(review: Review) -> tuple[str, str]:
    """Opening and continuation of the beginning of a text; the second begins with its space."""
    words = review.text.split(maxsplit=MOST_WORDS)[:MOST_WORDS]
    return " ".join(words[:OPENING_WORDS]), " " + " ".join(words[OPENING_WORDS:])


def write_texts(reviews: list[Review], folder: Path) -> None:
    """Openings with their continuations, to imitate, and openings of other texts as prompts."""
    parts = [(*halves(r), r.positive) for r in reviews if len(r.text.split()) >= LEAST_WORDS]
    # By hash, which is a fixed shuffle: the file of reviews has one label after the other.
    placed = sorted((split_position(opening + rest), opening, rest, positive) for opening, rest, positive in parts)
    # Pairs are what is read; nobody looks at what was rejected, so it is short.
    texts = ((a, b, positive) for at, a, b, positive in placed if at < TRAIN)
    rows = ({"prompt": a, "chosen": b, "rejected": " .", "positive": positive} for a, b, positive in texts)
    write_rows(folder / "texts.jsonl", rows)
    openings = dict.fromkeys(o for at, o, *_ in placed if at >= TRAIN and len(o) <= MOST_LETTERS)
    write_rows(folder / "prompts.jsonl", ({"prompt": opening} for opening in openings))


def text_features(model: RewardModel, texts: list[dict[str, Any]]) -> Tensor:
    """Features (N, H) of the beginnings of continuations, as long as a response."""
    encoder = Encoder(model.load_tokenizer())
    found = [encoder.response(Prompt(row["prompt"]), row["chosen"], ended=True) for row in texts]
    cut = [TokenSequence(s.ids[: s.prompt_length + RESPONSE_TOKENS], s.prompt_length) for s in found]
    return compute_features(model, cut, torch.device("cpu"))


def make_true_reward(root: Path, seed: int) -> TrueReward:
    """The true reward, from the labels, and what the reference says.

    Args:
        root: Folder with `base`, `texts.jsonl` and `prompts.jsonl`.
        seed: Seed of the reference's responses.
    """
    spec = FeatureSpec(Pretrained(str(root / "base")), pooling="mean")
    model = feature_model(spec)
    prompts, cpu = root / "data" / "prompts.jsonl", torch.device("cpu")
    _, answers = reference_responses(spec, prompts, RESPONSE_TOKENS, seed, batch_size=256)
    reference = compute_features(model, next(answers), cpu)
    with (root / "data" / "texts.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    loc, scale = reference.mean(0), reference.std(0)
    x = ((text_features(model, texts) - loc) / scale).numpy()
    y = [row["positive"] for row in texts]
    cut = len(texts) * 9 // 10
    probe = LogisticRegression(C=0.01, max_iter=500).fit(x[:cut], y[:cut])
    share = probe.score(x[cut:], y[cut:])
    print(f"true reward: says what people said of {share:.1%} of {len(texts) - cut} beginnings it has not seen")
    true = TrueReward.along(torch.from_numpy(probe.coef_[0]).float() / scale, reference, RESPONSE_TOKENS)
    # Others than those that it is centred and scaled on.
    ids, answers = reference_responses(spec, prompts, RESPONSE_TOKENS, seed + 1, batch_size=256)
    worth = [true(compute_features(model, found, cpu)) for found in islice(answers, TIMES)]
    true.prompts = PromptValues(ids, torch.stack(worth).mean(0))
    return true


def prepare(output: str, vocabulary: int = 1024, width: int = 128, layers: int = 2, seed: int = 0) -> None:
    """Prepare the tiny studies.

    Args:
        output: Folder of what they share.
        vocabulary: Tokens of the tokenizer.
        width: Width of the language model.
        layers: Its blocks.
        seed: Seed of weights and responses.

    Raises:
        ValueError: The folder was prepared with other options.
    """
    root = Path(output)
    root.mkdir(parents=True, exist_ok=True)
    options = {"vocabulary": vocabulary, "width": width, "layers": layers, "seed": seed}
    claim_folder(root, "output", options | {"response_tokens": RESPONSE_TOKENS, "times": TIMES})
    if (root / "true_reward").exists():
        print(f"{root / 'true_reward'} is there")
        return

    def start(folder: Path) -> None:
        with (root / "data" / "texts.jsonl").open(encoding="utf-8") as file:
            rows = map(json.loads, file)
            tokenizer = make_tokenizer([row["prompt"] + row["chosen"] for row in rows], vocabulary)
        tokenizer.save_pretrained(folder)
        make_model(tokenizer, width, layers, seed).save_pretrained(folder)

    def base(folder: Path) -> None:
        given = {
            "config": SFT,
            "trainer.default_root_dir": root / "sft",
            "model.base.path": root / "start",
            "data.tokenizer": root / "start",
            "data.preferences": root / "data" / "texts.jsonl",
            "overwrite": "true",
        }
        main(["sft", "fit", *(f"--{key}={value}" for key, value in given.items())])
        main(["export", f"--checkpoint={root / 'sft' / 'checkpoints' / 'last.ckpt'}", f"--output={folder}"])

    def true_reward(folder: Path) -> None:
        make_true_reward(root, seed).save(folder)

    once(root / "data", "texts and prompts", lambda folder: write_texts(read_reviews(), folder))
    once(root / "start", "tokenizer and weights", start)
    once(root / "base", "language model", base)
    once(root / "true_reward", "true reward", true_reward)


if __name__ == "__main__":
    auto_cli(prepare, as_positional=False)
