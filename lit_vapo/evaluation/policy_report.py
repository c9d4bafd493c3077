"""One evaluation of a policy: a table of responses and the figures that follow from it.

Every figure is defined in docs/metrics.md. P counts prompts, N the responses to each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_vapo.functional import best_of_n, best_of_n_kl, kl_k1, kl_k3, paired_gain, repetition, weighted_k3, win_rate

# The numbers of a response, by their names in a record; a response need not have those from gold on.
COLUMNS = (
    "reward",
    "sigma",
    "objective_reward",
    "kl",
    "kl_weight",
    "entropy",
    "length",
    "stopped",
    "gold",
    "distance",
    "relative_sigma",
    "members",
)
# With the name of a part of a reward that is a sum: its mean, and its σ.
PART_REWARD, PART_SIGMA = "reward_", "sigma_"
SCORES = ("reward", "gold")
MEMBERS_SHOWN = 16  # of a hundred heads a figure for each would hide the others; responses keep the scores of all
Records = list[dict[str, Any]]


def response_statistics(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Figures of a set of R responses, each a scalar.

    Args:
        columns: A tensor (R,) for each name of `COLUMNS`, `members` (R, K); those from `gold` on where there are any.
            `entropy` is the mean over the tokens of a response. And one (R,) for each number of a part.
    """
    reward, log_ratio, weight, length = (columns[name] for name in ("reward", "kl", "kl_weight", "length"))
    statistics = {
        "reward_mean": reward.mean(),
        "reward_std": reward.std(correction=0),
        "objective_reward": columns["objective_reward"].mean(),
        "ensemble_sigma": columns["sigma"].mean(),
        "kl_k1": kl_k1(log_ratio).mean(),
        "kl_k3": kl_k3(log_ratio).mean(),
        "kl_weighted_k3": weighted_k3(log_ratio, weight).mean(),
        "kl_weight_mean": weight.mean(),
        "kl_weight_max": weight.max(),
        "entropy": (columns["entropy"] * length).sum() / length.sum(),
        "response_length": length.mean(),
        "response_length_std": length.std(correction=0),
        "eos_rate": columns["stopped"].mean(),
    }
    if "gold" in columns:
        statistics["gold"] = columns["gold"].mean()
        statistics["gold_std"] = columns["gold"].std(correction=0)
    if "distance" in columns:
        statistics["outlier_distance"] = columns["distance"].mean()
        statistics["outlier_share"] = (columns["distance"] > 1).to(columns["distance"]).mean()
    if "relative_sigma" in columns:
        statistics["relative_sigma"] = columns["relative_sigma"].mean()
    if "members" in columns:
        statistics |= {
            f"reward_member_{k}": mean for k, mean in enumerate(columns["members"][:, :MEMBERS_SHOWN].mean(0))
        }
    return statistics | {name: columns[name].mean() for name in columns if _of_a_part(name)}


def _of_a_part(name: str) -> bool:
    return name.startswith((PART_REWARD, PART_SIGMA))


class PolicyReport:
    """What a policy's responses to a set of prompts say about it.

    A plain class, as `PreferenceReport` is; figures are computed when they are asked for.

    Args:
        records: A record for each response, as `sample_rows` makes them, the responses to a prompt together.

    Raises:
        ValueError: There is none, or prompts differ in how many they have.
    """

    def __init__(self, records: Records) -> None:
        if not records:
            raise ValueError("expected at least one response, got none")
        self.records = records
        self.prompt_ids = list(dict.fromkeys(record["prompt_id"] for record in records))
        self.num_prompts = len(self.prompt_ids)
        self.num_responses = len(records) // self.num_prompts
        expected = [prompt_id for prompt_id in self.prompt_ids for _ in range(self.num_responses)]
        if [record["prompt_id"] for record in records] != expected:
            raise ValueError(
                f"expected equally many responses to each prompt, side by side, got {len(records)} to "
                f"{self.num_prompts} prompts"
            )
        self.columns = {
            name: torch.tensor([record[name] for record in records], dtype=torch.float64)
            for name in (*COLUMNS, *filter(_of_a_part, records[0]))
            if records[0].get(name) not in (None, [])
        }

    def select(self, prompt_ids: Sequence[int]) -> PolicyReport:
        """Report on these prompts, in this order.

        Raises:
            ValueError: One of them was not answered.
        """
        missing = set(prompt_ids) - set(self.prompt_ids)
        if missing:
            raise ValueError(f"expected responses to the same prompts, got none to prompt {min(missing)}")
        first = {prompt_id: i * self.num_responses for i, prompt_id in enumerate(self.prompt_ids)}
        return PolicyReport([self.records[first[i] + j] for i in prompt_ids for j in range(self.num_responses)])

    def scores(self, name: str) -> Tensor:
        """One of `SCORES` by prompt, (P, N)."""
        return self.columns[name].view(self.num_prompts, self.num_responses)

    @property
    def judged_by(self) -> list[str]:
        """Which of `SCORES` there are."""
        return [name for name in SCORES if name in self.columns]

    @cached_property
    def best_of_n(self) -> dict[str, Tensor]:
        """Expected scores (N,) of the response that the ensemble's mean ranks highest among n = 1 … N, by score."""
        return {name: best_of_n(self.scores("reward"), self.scores(name)).mean(0) for name in self.judged_by}

    def best_of_n_table(self) -> dict[str, list[float]]:
        """The curves with n and the bound of the KL from the policy to its best of n."""
        n = torch.arange(1, self.num_responses + 1)
        curves = {"n": n, "kl_bound": best_of_n_kl(n.double()), **self.best_of_n}
        return {name: curve.tolist() for name, curve in curves.items()}

    def summary(self) -> dict[str, float]:
        """What is logged of a policy, by the names of docs/metrics.md."""
        out = {name: float(value) for name, value in response_statistics(self.columns).items()}
        out |= repetition([record["response"] for record in self.records])._asdict()
        if self.num_responses > 1:
            out |= {f"best_of_n_{name}": float(curve[-1]) for name, curve in self.best_of_n.items()}
        return out


def compare(policy: PolicyReport, reference: PolicyReport) -> dict[str, float]:
    """How much better a policy is than its reference on the same prompts, by the names of docs/metrics.md.

    Args:
        policy: Its responses.
        reference: The reference's, to these prompts and perhaps to others.

    Raises:
        ValueError: The reference did not answer one of the prompts.
    """
    reference = reference.select(policy.prompt_ids)
    out = {}
    for name in policy.judged_by:
        ours, theirs = policy.scores(name), reference.scores(name)
        gain = paired_gain(ours, theirs)
        out["win_rate" if name == "gold" else f"{name}_win_rate"] = float(win_rate(ours, theirs))
        out[f"{name}_gain"] = float(gain.mean)
        out[f"{name}_gain_se"] = float(gain.standard_error)
    return out
