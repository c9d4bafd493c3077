"""Reward ensembles against RewardUQ 0.1.0 and TRL 1.12.0: time and memory of training, same pairs, same backbone.

    python -m venv peer && peer/bin/pip install rewarduq==0.1.0 "transformers<5"
    python benchmarks/reward_uq.py --peer_python peer/bin/python
    python benchmarks/reward_uq.py --peer_python peer/bin/python --model FOLDER --dtype bfloat16
    python -m venv trl && trl/bin/pip install -c constraints-cpu.txt trl==1.12.0
    python benchmarks/reward_uq.py --trl_python trl/bin/python --parts '[trl]'

Without `--peer_python` only our own times are taken. Every training has a process of its own, with its own clock and
its own peak of memory; ours and the peer's alternate, and ratios are taken pair by pair, so a machine whose speed
drifts favours neither. Times run from before the first step to after the last: imports are left out, and reading,
tokenising and loading are printed apart.

What is measured:

- heads: K linear heads on a frozen backbone, from features that are there (`cached`), and the first epoch with the
  computation of the features;
- trl: ten heads of ours against one reward model of TRL's on a frozen backbone, one epoch of both;
- adapters: K LoRA members with a reward head each, on all blocks and on the top quarter of them; ours in one
  training, the peer's in one training per member, times summed;
- defaults: the same on all blocks as both come: the peer recomputes activations, and our members each read the pairs
  of their own bootstrap (the peer has none);
- growth: ours alone, 2K members on the top quarter against one;
- bootstrap: ours alone, members that each read the pairs of their own bootstrap, against all pairs: adapters on all
  blocks, and whole models.

Equal on both sides, but for `defaults`: texts, tokens, batch size, steps, data type, threads, AdamW and its settings,
rank, scale and place of the adapters. Off on both sides: bootstrap, regularisation, gradient clipping, logging,
checkpoints, evaluation, progress bars. The peer recomputes activations in the backward pass wherever there are
adapters; here that is off, which is to its advantage (`--checkpointing true` leaves it on).

Not equal: the peer's heads have no bias, and it computes the norm of their move even where it counts for nothing. It
pads prompts on the left and responses on the right, each to the longest of its batch, in random order; we pad whole
sequences and put pairs of similar length into a batch. Its features come in batches of equally many pairs, ours in
batches of similar length, both of at most as many tokens. It runs under transformers 4, we under 5.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))

from job import Answer, Job, start  # noqa: E402

from lit_vapo.models.batching import TOKENS_ON_CPU  # noqa: E402
from lit_vapo.models.weights import quiet  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = """
the a of to and in that it is was for on with as his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after words called just where most know
"""
WORDS = TEXT.split()
GOOD, BAD = ["good", "great", "best", "happy"], ["bad", "wrong", "worst", "sad"]


def write_pairs(path: Path, count: int, seed: int = 0) -> None:
    """Preferences of 40 to 120 words; the preferred response has more good words than bad ones."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = rng.choices(WORDS, k=rng.randint(10, 40))
        sides = [rng.choices(WORDS + 2 * words, k=rng.randint(30, 80)) for words in (GOOD, BAD)]
        chosen, rejected = (" " + " ".join(words) for words in sides)
        rows.append({"prompt": " ".join(prompt), "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(folder: Path, width: int = 256) -> None:
    """A Llama of random parameters (6.3 million by default), and a tokenizer with a token for each word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    words = [*special, *WORDS, *GOOD, *BAD]
    words += [f"word{i}" for i in range(8192 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    # The peer refuses a tokenizer without one.
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=688 * width // 256,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def for_transformers_4(folder: Path, copy: Path) -> None:
    """The model's folder as transformers 4 reads it."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".json" or file.name not in ("config.json", "tokenizer_config.json"):
            (copy / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    (copy / "config.json").write_text(json.dumps(config))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (copy / "tokenizer_config.json").write_text(json.dumps(config))


def run(python: str, worker: str, job: Job) -> Answer:
    """One training in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        return Answer(**start(python, worker, replace(job, work=work), Path(work), job.threads))


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({low}–{high})"


def line(name: str, ours: list[float], others: list[float], target: str, unit: str = "s") -> None:
    """A row of the table; the ratio says how many times ours goes into the other's."""
    shown = f"{statistics.median(ours):9.3g} {unit:2}"
    if not others:
        print(f"{name:44} {shown}", flush=True)
        return
    ratios = [b / a for a, b in zip(ours, others, strict=True)]
    print(f"{name:44} {shown} {statistics.median(others):9.3g} {unit:2}  {spread(ratios):20} {target}", flush=True)


class Comparison:
    """Ours and the peer's trainings of a job, alternating."""

    def __init__(self, job: Job, peer: Callable[[Job], Answer] | None, repetitions: int) -> None:
        self.ours: list[Answer] = []
        self.others: list[Answer] = []
        for i in range(repetitions):
            for side in ("ours", "peer")[:: 1 if i % 2 else -1]:
                if side == "ours":
                    self.ours.append(run(sys.executable, "ours.py", job))
                elif peer is not None:
                    self.others.append(peer(job))
        steps = {answer.steps for answer in self.ours + self.others}
        if len(steps) != 1:
            raise SystemExit(f"expected equally many steps on both sides, got {sorted(steps)}")

    def line(self, name: str, quantity: Callable[[Answer], float], target: str = "", unit: str = "s") -> None:
        """A row of the table."""
        line(name, [quantity(a) for a in self.ours], [quantity(a) for a in self.others], target, unit)


def growth(job: Job, repetitions: int) -> None:
    """Ours alone: 2K members on the top quarter against one."""
    jobs = [replace(job, members=members) for members in (1, 2 * job.members)]
    one, many = alternating(jobs, lambda answer: answer.whole, repetitions)
    ratios = [b / a for a, b in zip(one, many, strict=True)]
    print(
        f"growth: {2 * job.members} members on the top {job.top_layers} of {job.layers} blocks against one: "
        f"{statistics.median(many):.3g} s, {statistics.median(one):.3g} s, ratio {spread(ratios)}; target: at most 3"
    )


def bootstrapped(job: Job, repetitions: int) -> None:
    """Ours alone: members that read the pairs of their own bootstrap against members that read all."""
    for part, name in (("adapters", "adapters on all blocks"), ("whole", "whole models")):
        jobs = [replace(job, part=part, bootstrap=bootstrap) for bootstrap in (True, False)]
        own, every = alternating(jobs, lambda answer: answer.train, repetitions)
        ratios = [b / a for a, b in zip(own, every, strict=True)]
        print(
            f"bootstrap: {job.members} members, {name}, each with its own pairs against all pairs: "
            f"{statistics.median(own):.3g} s, {statistics.median(every):.3g} s, ratio {spread(ratios)}",
            flush=True,
        )


def alternating(jobs: list[Job], quantity: Callable[[Answer], float], repetitions: int) -> list[list[float]]:
    """A quantity of our own trainings, a list for each of two jobs, which take turns in beginning."""
    found: list[list[float]] = [[], []]
    for i in range(repetitions):
        for job, values in list(zip(jobs, found, strict=True))[:: -1 if i % 2 else 1]:
            values.append(quantity(run(sys.executable, "ours.py", job)))
    return found


def main(
    peer_python: str | None = None,
    trl_python: str | None = None,
    model: str | None = None,
    members: int = 4,
    pairs: int = 256,
    adapter_pairs: int = 64,
    batch_size: int = 8,
    max_length: int = 160,
    epochs: int = 4,
    rank: int = 8,
    dtype: str = "float32",
    checkpointing: bool = False,
    repetitions: int | None = None,
    threads: int = 1,
    processor_time: bool = False,
    parts: list[str] = ["heads", "trl", "adapters", "defaults", "growth", "bootstrap"],  # noqa: B006
) -> None:
    """Print the table.

    Args:
        peer_python: Interpreter of an environment with RewardUQ; `null` leaves the peer out.
        trl_python: Interpreter of an environment with TRL; `null` leaves it out.
        model: Folder of a Llama-like model with its tokenizer; `null` makes a small one.
        members: K.
        pairs: Preferences that the heads learn from.
        adapter_pairs: Preferences that the adapters learn from.
        batch_size: Pairs of a step.
        max_length: Most tokens of a sequence; the texts have 40 to 120 words.
        epochs: Passes over the cached features.
        rank: Rank of the adapters.
        dtype: Data type of the backbone.
        checkpointing: Let the peer recompute activations, as it does by default.
        repetitions: Pairs of timings; `null` for 5 with the peer and 3 without.
        threads: Threads of torch.
        processor_time: Count the seconds that a process computed, not those that passed: for a busy machine, with one
            thread.
        parts: What to measure.
    """
    repetitions = repetitions or (5 if peer_python or trl_python else 3)
    quiet()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(model) if model else Path(root) / "model"
        if model is None:
            make_model(folder)
        for_transformers_4(folder, Path(root) / "model_4")
        write_pairs(Path(root) / "pairs.jsonl", pairs)
        write_pairs(Path(root) / "adapter_pairs.jsonl", adapter_pairs)
        layers: int = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        settings: dict[str, Any] = {"rank": rank, "alpha": 2.0 * rank, "targets": TARGETS, "layers": layers}
        settings |= {"dtype": dtype, "checkpointing": checkpointing, "feature_tokens": TOKENS_ON_CPU}
        settings |= {
            "processor_time": processor_time,
            "threads": threads,
            "learning_rate": 1e-3,
            "batch_size": batch_size,
            "max_length": max_length,
        }
        top = max(1, layers // 4)
        job = Job("heads", str(folder), f"{root}/pairs.jsonl", "", members, epochs=epochs, top_layers=top, **settings)

        def ask_peer(job: Job) -> Answer:
            assert peer_python is not None
            return run(peer_python, "peer.py", replace(job, model=f"{root}/model_4"))

        peer = ask_peer if peer_python else None
        print(
            f"{folder.name}, {layers} blocks, {dtype}; K = {members}, batch {batch_size}, {threads} thread(s), "
            f"{repetitions} alternating pairs; ratio = peer / ours, median (from–to)"
        )
        print(f"{'':44} {'ours':>12} {'the peer':>12}  {'ratio':20} target", flush=True)
        if "heads" in parts:
            both = Comparison(job, peer, repetitions)
            both.line(f"heads, cached features, {epochs}×{pairs} pairs", lambda a: a.train, ">= 2")
            both.line(f"heads, features and first epoch, {pairs} pairs", lambda a: a.whole, ">= 1")
            both.line("    reading, tokenising, loading", lambda a: a.rest)
            both.line("    peak memory", lambda a: a.peak_mb, unit="MB")
        if "trl" in parts and trl_python is not None:
            ten = replace(job, members=10, epochs=1)
            both = Comparison(ten, lambda job: run(trl_python, "trl_rewards.py", job), repetitions)
            both.line(f"10 heads, first epoch, {pairs} pairs; TRL: one", lambda a: a.whole, ">= 0.83")
            both.line("    reading, tokenising, loading", lambda a: a.rest)
            both.line("    peak memory", lambda a: a.peak_mb, unit="MB")
        job = replace(job, part="adapters", pairs=f"{root}/adapter_pairs.jsonl", epochs=1)
        if "adapters" in parts:
            for name, count in (("all", layers), ("top quarter", top)):
                both = Comparison(replace(job, top_layers=count), peer, repetitions)
                both.line(f"adapters on {name} ({count} blocks), {adapter_pairs} pairs", lambda a: a.whole, ">= 2")
                both.line("    reading, tokenising, loading", lambda a: a.rest)
                both.line("    peak memory", lambda a: a.peak_mb, unit="MB")
        if "defaults" in parts:
            both = Comparison(replace(job, top_layers=layers, checkpointing=True, bootstrap=True), peer, repetitions)
            both.line(f"adapters on all, as both come, {adapter_pairs} pairs", lambda a: a.whole, ">= 2")
            both.line("    peak memory", lambda a: a.peak_mb, unit="MB")
        if "growth" in parts:
            growth(job, repetitions)
        if "bootstrap" in parts:
            bootstrapped(replace(job, top_layers=layers), repetitions)
    if peer_python is None:
        print("The peer was left out: --peer_python wants the interpreter of an environment with RewardUQ.")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
