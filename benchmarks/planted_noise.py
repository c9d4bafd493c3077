"""Does σ follow the noise? Preferences whose noise is known for each response, and each estimator's σ beside it.

G kinds of response are each compared with one baseline: the kind g in n_g pairs, each judged by m_g annotators who
prefer g with probability p_g (Bradley–Terry). All that can be learned of g is its share of votes, so the best estimate
of its margin over the baseline has the standard error

    σ_g = 1 / √( n_g · m_g · p_g · (1 − p_g) )

by the delta method. Two tasks make it differ between kinds:

- `pairs`: n_g differs, m_g = 1. Here the noise is also in the curvature of the loss: what is rare is learned slowly.
- `votes`: m_g differs, n_g does not. Here the noise is nowhere but in the scatter of the labels: every kind is seen
  equally often, and an estimator that goes by frequency or by curvature cannot tell them apart.

Counts and margins are dealt to the kinds at random. Each estimator learns from the same pairs; then Spearman's rank
correlation of its σ with σ_g is taken over the kinds, and the median of their ratios. K refits to K fresh draws of all
labels stand beside them: what an ideal ensemble of K members reaches.

    python benchmarks/planted_noise.py
    python benchmarks/planted_noise.py --seeds 10 --members 4
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lit_vapo.functional import spearman
from lit_vapo.models.batching import right_pad
from lit_vapo.models.pretrained import Pretrained, decoder_layers, freeze, hidden_size, load_backbone
from lit_vapo.models.weights import quiet
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.members.bayesian import BayesianLinear
from lit_vapo.rewards.members.dropout import McDropout
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.types import FeaturePairs, PairLabels

HIDDEN = 64
PROMPT = [5, 6]
FIRST_KIND = 20  # this token id marks the baseline, those after it the kinds


class Task(NamedTuple):
    """Preferences between G kinds of response and a baseline, in N pairs.

    Attributes:
        pairs: `(G,)`, n_g, pairs of each kind.
        votes: `(G,)`, m_g, annotators of each pair.
        margin: `(G,)`, true margin of each kind over the baseline, in log-odds.
        noise: `(G,)`, σ_g, standard error of the best estimate of that margin, in log-odds.
        kind: `(N,)` int64, which kind each pair compares with the baseline.
        share: `(N,)`, share of its votes that the kind got.
    """

    pairs: Tensor
    votes: Tensor
    margin: Tensor
    noise: Tensor
    kind: Tensor
    share: Tensor


def plant(
    pairs: tuple[int, int], votes: tuple[int, int], kinds: int = 20, largest_margin: float = 1.0, seed: int = 0
) -> Task:
    """Draw a task.

    Args:
        pairs: Fewest and most pairs of a kind; evenly spaced in the logarithm between them.
        votes: Fewest and most annotators of a pair, likewise.
        kinds: G.
        largest_margin: Margins are evenly spaced in ± this, in log-odds.
        seed: Seed of who gets which counts and margin, and of the votes.
    """
    generator = torch.Generator().manual_seed(seed)

    def deal(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, kinds)[torch.randperm(kinds, generator=generator)]

    n, m = (deal(*torch.tensor(ends).log2().tolist()).exp2().round() for ends in (pairs, votes))
    margin = deal(-largest_margin, largest_margin)
    p = torch.sigmoid(margin)
    kind = torch.arange(kinds).repeat_interleave(n.long())
    share = torch.binomial(m[kind], p[kind], generator=generator) / m[kind]
    return Task(n, m, margin, (n * m * p * (1 - p)).rsqrt(), kind, share)


def pairs_task(seed: int) -> Task:
    """Noise from the number of pairs."""
    return plant(pairs=(24, 960), votes=(1, 1), seed=seed)


def votes_task(seed: int) -> Task:
    """Noise from the number of annotators."""
    return plant(pairs=(60, 60), votes=(1, 40), seed=seed)


def redrawn_noise(task: Task, redraws: int = 2000, seed: int = 0) -> Tensor:
    """Standard deviation (G,) of the estimated margin over new draws of all votes: the noise without the formula.

    The estimate is the empirical logit log((won + ½) / (lost + ½)), finite where one side never wins (Haldane 1956).
    """
    generator = torch.Generator().manual_seed(seed)
    total = (task.pairs * task.votes).expand(redraws, -1)
    won = torch.binomial(total, torch.sigmoid(task.margin).expand(redraws, -1), generator=generator)
    return ((won + 0.5) / (total - won + 0.5)).log().std(0)


def learned_noise(
    head: RewardHead, encode: Callable[[], Tensor], task: Task, steps: int, learning_rate: float
) -> Tensor:
    """σ (G,) of the margins over the baseline after training, in log-odds.

    The optimiser is the reward stage's (AdamW with linear decay), each step on all pairs.

    Args:
        head: The estimator, built.
        encode: Features of the baseline and the G kinds, in this order.
        task: The preferences.
        steps: Steps of the optimiser.
        learning_rate: The first step's learning rate.
    """
    rows, baseline = task.kind + 1, torch.zeros_like(task.kind)
    won = task.share >= 0.5
    chosen, rejected = torch.where(won, rows, baseline), torch.where(won, baseline, rows)
    ones = torch.ones(len(rows))
    labels = PairLabels(0 * ones, torch.maximum(task.share, 1 - task.share), ones, torch.arange(len(rows)))
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def pairs() -> FeaturePairs:
        features = encode()
        return FeaturePairs(features.index_select(0, chosen), features.index_select(0, rejected), labels)

    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(*pairs()).backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        head.settle([pairs()])
        features = encode()
        return head.margin(features[1:], features[:1].expand_as(features[1:])).variance.sqrt()


def from_features(head: RewardHead, task: Task, steps: int = 200, learning_rate: float = 0.05) -> Tensor:
    """σ (G,) of an estimator on random features: a vector for each kind, which says nothing of its noise."""
    torch.manual_seed(head.seed)
    features = torch.randn(len(task.pairs) + 1, HIDDEN)
    head.build(HIDDEN)
    return learned_noise(head, lambda: features, task, steps, learning_rate)


def from_tokens(head: RewardHead, model: str, task: Task, steps: int = 80, learning_rate: float = 0.005) -> Tensor:
    """σ (G,) of an estimator on a frozen language model: the response is a token that tells its kind."""
    spec = FeatureSpec(Pretrained(model))
    head.build(hidden_size(spec.base))
    backbone = freeze(load_backbone(spec.base))
    reward = RewardModel(spec, head, head.attach(backbone, decoder_layers(backbone)))
    ids, lengths = right_pad([[*PROMPT, FIRST_KIND + g] for g in range(len(task.pairs) + 1)])
    prompts = torch.full_like(lengths, len(PROMPT))
    return learned_noise(head, lambda: reward.encode(ids, lengths, prompts), task, steps, learning_rate)


def tiny_model(folder: str) -> str:
    """A random Llama of two blocks, saved into `folder`."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    return folder


def estimators(members: int, model: str) -> dict[str, Callable[[Task, int], Tensor]]:
    """σ (G,) by a row's name, as functions of a task and a seed."""
    return {
        "K redraws, refitted": lambda task, seed: redrawn_noise(task, members, seed),
        "`HeadEnsemble`": lambda task, seed: from_features(HeadEnsemble(members, seed=seed), task),
        "`HeadEnsemble`, no bootstrap": lambda task, seed: from_features(
            HeadEnsemble(members, bootstrap=False, seed=seed), task
        ),
        "`LoraEnsemble`": lambda task, seed: from_tokens(LoraEnsemble(members, seed=seed), model, task),
        "`LoraEnsemble`, no bootstrap": lambda task, seed: from_tokens(
            LoraEnsemble(members, bootstrap=False, seed=seed), model, task
        ),
        "`McDropout`": lambda task, seed: from_features(McDropout(members, seed=seed), task),
        "`BayesianLinear`": lambda task, seed: from_features(BayesianLinear(members, seed=seed), task),
    }


def figures(sigmas: list[Tensor], tasks: list[Task]) -> list[str]:
    """The cells of a row: ρ (median and least over tasks), ρ with shuffled noise, ratio of σ to the noise."""
    both = list(zip(sigmas, tasks, strict=True))
    found = [spearman(sigma, task.noise).item() for sigma, task in both]
    # Noise that belongs to other kinds, over several shuffles of each task.
    generator = torch.Generator().manual_seed(0)
    shuffles = [(sigma, task.noise[torch.randperm(len(sigma), generator=generator)]) for sigma, task in 20 * both]
    shuffled = [spearman(sigma, noise).item() for sigma, noise in shuffles]
    ratio = statistics.median((sigma / task.noise).median().item() for sigma, task in both)
    return [f"{statistics.median(found):.2f}", f"{min(found):.2f}", f"{statistics.mean(shuffled):+.2f}", f"{ratio:.3f}"]


def main(seeds: int = 5, members: int = 10, threads: int = 1) -> None:
    """Print a table for both tasks.

    Args:
        seeds: How many tasks of each kind, from seed 0 on.
        members: K.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    quiet()
    print(f"Spearman's ρ of σ with the known noise over 20 kinds of response, {seeds} seeds, K = {members}\n")
    print("| task | σ from | ρ median | ρ least | ρ with shuffled noise | σ / noise |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        rows = estimators(members, tiny_model(folder))
        for name, make in {"pairs": pairs_task, "votes": votes_task}.items():
            tasks = [make(seed) for seed in range(seeds)]
            for row, learn in rows.items():
                sigmas = [learn(task, seed) for seed, task in enumerate(tasks)]
                print(f"| {name} | {row} | {' | '.join(figures(sigmas, tasks))} |", flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
