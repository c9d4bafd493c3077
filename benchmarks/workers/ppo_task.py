"""The task of `benchmarks/trl_ppo.py`: a made-up language, a policy, a reward model that errs, and the judge."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lit_vapo.cli import main as lit_vapo

TOPICS, WORDS_PER_TOPIC = 16, 12
PAD, EOS, FIRST = 0, 1, 3
STAY, END = 0.85, 0.06
PROMPT, RESPONSE = 8, 16


class Language:
    """Words in topics; a text stays on its topic for a while, and a word is followed by a few of the same topic."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.worth = torch.randn(TOPICS, generator=generator)
        following = torch.randn(TOPICS, WORDS_PER_TOPIC, WORDS_PER_TOPIC, generator=generator)
        self.following = (2 * following).softmax(-1)

    def write(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Token ids (count, length) of texts; one may end at any place after the prompt's, and is then padded."""
        topic = torch.randint(TOPICS, (count,), generator=generator)
        word = torch.randint(WORDS_PER_TOPIC, (count,), generator=generator)
        columns = []
        for _ in range(length):
            columns.append(FIRST + topic * WORDS_PER_TOPIC + word)
            word = torch.multinomial(self.following[topic, word], 1, generator=generator)[:, 0]
            leave = torch.rand(count, generator=generator) > STAY
            topic = torch.where(leave, torch.randint(TOPICS, (count,), generator=generator), topic)
        ids = torch.stack(columns, dim=1)
        ends = torch.rand(ids.shape, generator=generator) < END
        ends[:, : PROMPT + 1] = False
        ended = ends.cumsum(1)
        ids[(ended == 1) & ends] = EOS
        return torch.where(ended - ends.long() > 0, PAD, ids)

    def gold(self, response: list[int]) -> float:
        """Mean worth of the words of a response; 0 of an empty one."""
        worths = [float(self.worth[(t - FIRST) // WORDS_PER_TOPIC]) for t in response if t >= FIRST]
        return sum(worths) / len(worths) if worths else 0.0


def texts(ids: torch.Tensor) -> list[str]:
    """The words of token ids."""
    return [" ".join(f"w{t - FIRST}" for t in row if t >= FIRST) for row in ids.tolist()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_policy(folder: Path, language: Language, steps: int) -> None:
    """Teach a Llama of two million parameters the language."""
    special = ["<pad>", "<eos>", "<unk>"]
    names = [*special, *(f"w{i}" for i in range(TOPICS * WORDS_PER_TOPIC))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(names), pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS, **sizes)
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 20, 1.05 - step / steps)
        ids = language.write(64, PROMPT + RESPONSE, generator)
        labels = torch.where(ids == PAD, -100, ids)
        loss = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"the policy's loss after {steps} steps: {loss.item():.3f} nats a token", flush=True)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


class Judged(NamedTuple):
    """A policy on the held-out prompts.

    Attributes:
        k1: KL to the reference of whole responses, by k1, nats.
        k3: The same by k3.
        gold: Mean gold reward.
        length: Mean tokens of a response.
    """

    k1: float
    k3: float
    gold: float
    length: float


class Judge:
    """The one evaluator: gold and KL of whole responses, with the same prompts and random numbers for all policies.

    It is plain transformers, and shares no code with either side.
    """

    def __init__(self, reference: Path, language: Language, count: int) -> None:
        self.language = language
        self.reference = load(reference)
        self.prompts = language.write(count, PROMPT, torch.Generator().manual_seed(99))

    @torch.no_grad()
    def __call__(self, folder: Path) -> Judged:
        """Judge the policy in a folder."""
        policy = load(folder)
        torch.manual_seed(0)
        sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": RESPONSE}
        mask = torch.ones_like(self.prompts)
        ids = policy.generate(self.prompts, attention_mask=mask, eos_token_id=EOS, pad_token_id=PAD, **sampling)
        responses = ids[:, PROMPT:]
        ended = responses == EOS
        counts = ended.cumsum(1) - ended.long() == 0
        chosen = [
            model(input_ids=ids).logits[:, PROMPT - 1 : -1].log_softmax(-1).gather(2, responses[..., None])[..., 0]
            for model in (policy, self.reference)
        ]
        ratio = torch.where(counts, chosen[0] - chosen[1], 0.0).double().sum(1)
        k3 = (-ratio).exp() - 1 + ratio
        gold = statistics.fmean(self.language.gold(row[row > 0].tolist()) for row in torch.where(counts, responses, 0))
        return Judged(float(ratio.mean()), float(k3.mean()), gold, float(counts.sum(1).double().mean()))


def load(folder: Path) -> PreTrainedModel:
    """The language model in a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_reward(folder: Path, policy: Path, language: Language, pairs: int, seed: int) -> None:
    """A linear reward head for PPO of ours, and the same as a classifier."""
    generator = torch.Generator().manual_seed(1000 + seed)
    whole = language.write(2 * pairs, PROMPT + RESPONSE, generator)
    prompts, responses = texts(whole[:pairs, :PROMPT]), whole[:, PROMPT:]
    gold = torch.tensor([language.gold(row) for row in responses.tolist()])
    # Annotators err: half of the time where the golds are equal, a quarter of the time where they differ by 0.37.
    odds = torch.sigmoid(3 * (gold[:pairs] - gold[pairs:]))
    kept = torch.rand(pairs, generator=generator) < odds
    rows = []
    for prompt, one, two, first in zip(prompts, texts(responses[:pairs]), texts(responses[pairs:]), kept, strict=True):
        chosen, rejected = (one, two) if first else (two, one)
        rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
    folder.mkdir(parents=True, exist_ok=True)
    preferences = write_rows(folder / "preferences.jsonl", rows)
    train_heads(folder, policy, preferences, seed)


def train_heads(
    folder: Path,
    policy: Path,
    preferences: str,
    seed: int,
    members: int = 1,
    max_length: int = PROMPT + RESPONSE,
    response: int = RESPONSE,
    kind: str = "HeadEnsemble",
) -> None:
    """Linear reward heads on a frozen policy, below `ensemble`; the same below `classifier` if there is one head.

    Args:
        folder: Where to.
        policy: The policy.
        preferences: A `.jsonl` with `prompt`, `chosen` and `rejected`.
        seed: Seed of the training.
        members: Heads.
        max_length: Most tokens of prompt and response.
        response: Most tokens of the responses that the heads are calibrated on.
        kind: Another estimator in place of heads, by its name.
    """
    options = {
        "seed_everything": seed,
        "trainer.default_root_dir": folder / "run",
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 10,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "model.base.path": policy,
        "model.reference.path": policy,
        "model.reference_sampling.max_new_tokens": response,
        "model.head": kind,
        "model.head.num_members": members,
        "model.head.bootstrap": str(members > 1).lower(),
        # What a classifier reads; and a critic that starts from it should be a whole model.
        "model.pooling": "last",
        "model.layer": "null",
        "model.learning_rate": 1e-2 if kind == "HeadEnsemble" else 1e-4,
        "data.tokenizer": policy,
        "data.preferences": preferences,
        "data.batch_size": 16,
        "data.max_length": max(64, max_length),
        "overwrite": "true",
    }
    lit_vapo(["reward", "fit", *(f"--{name}={value}" for name, value in options.items())])
    checkpoint = f"--checkpoint={folder}/run/checkpoints/last.ckpt"
    lit_vapo(["export", checkpoint, f"--output={folder}/ensemble"])
    if members == 1:
        lit_vapo(["export", checkpoint, f"--output={folder}/classifier", "--classifier=true"])
