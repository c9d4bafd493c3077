"""What is measured: thin torchmetrics over pure functions, and the statistics of a rollout.

Every key is defined in docs/metrics.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_vapo.evaluation.policy_report import COLUMNS, PART_REWARD, PART_SIGMA, response_statistics
from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.functional import masked_mean, masked_sum
from lit_vapo.functional.masked import check_same_shape
from lit_vapo.rollout import Rollout
from lit_vapo.types import PairLabels, RewardEstimate


class ExampleMetric(Metric):
    """Collects numbers of examples over batches and processes.

    Samplers repeat rows to give every process as many; so each example id counts once, by its first occurrence, and
    rows are ordered by id, whatever the order and number of processes.
    """

    full_state_update = False
    example_ids: list[Tensor]
    columns: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("example_ids", default=[], dist_reduce_fx="cat")
        # One table for all numbers of an example, so that processes exchange two tensors and not six.
        self.add_state("columns", default=[], dist_reduce_fx="cat")

    def _add(self, example_ids: Tensor, columns: Tensor) -> None:
        """Take the numbers (B, C) of B examples."""
        self.example_ids.append(example_ids)
        self.columns.append(columns.detach())

    def _each_once(self) -> tuple[Tensor, Tensor]:
        """Example ids in their order (N,) and the first row of each (N, C), on the CPU."""
        ids, rows = dim_zero_cat(self.example_ids).cpu(), dim_zero_cat(self.columns).cpu()
        ids, order = ids.sort(stable=True)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[1:] = ids[1:] != ids[:-1]
        return ids[first], rows[order[first]]


class TokenLoss(ExampleMetric):
    """Mean loss over the response tokens of a split, over batches and processes."""

    def update(self, loss: Tensor, tokens: Tensor, example_ids: Tensor) -> None:
        """Add B responses.

        Args:
            loss: Sum of the loss over the tokens of each (B,).
            tokens: Their number (B,).
            example_ids: Stable identities (B,).

        Raises:
            ValueError: A shape does not fit.
        """
        check_same_shape(loss=loss, tokens=tokens, example_ids=example_ids)
        self._add(example_ids, torch.stack([loss.float(), tokens.float()], dim=1))

    def compute(self) -> Tensor:
        """The mean, ()."""
        _, columns = self._each_once()
        loss, tokens = columns.double().sum(0)
        return (loss / tokens.clamp_min(1)).float()


class PreferenceMetrics(ExampleMetric):
    """Collects the margins of a split over batches and processes; `compute` gives a `PreferenceReport`.

    Pairs that are ties (probability 0.5) have no right answer: they are counted and otherwise left out. Pairs with a
    probability between 0.5 and 1 count as preferences for the chosen response; weights are not used.
    """

    def update(
        self, margin: RewardEstimate, chosen: RewardEstimate, rejected: RewardEstimate, labels: PairLabels
    ) -> None:
        """Add B pairs; members are (B, K) in all three estimates, or None.

        Args:
            margin: Estimate of the raw margins (B,), in log-odds.
            chosen: Estimate of the normalised reward of the preferred responses.
            rejected: The same of the others.
            labels: What is known of the pairs.

        Raises:
            ValueError: A shape does not fit.
        """
        check_same_shape(margin=margin.mean, chosen=chosen.mean, rejected=rejected.mean, example_ids=labels.example_ids)
        numbers = [margin.mean, margin.variance, chosen.variance, rejected.variance, labels.probability]
        # Who does not tell the noise of labels apart has none to say.
        numbers += [
            torch.full_like(x.mean, torch.nan) if x.aleatoric is None else x.aleatoric for x in (chosen, rejected)
        ]
        parts = [torch.stack([x.float() for x in numbers], dim=1)]
        parts += [x for x in (margin.members, chosen.members, rejected.members) if x is not None]
        parts += [chosen.mean[:, None], rejected.mean[:, None]]
        self._add(labels.example_ids, torch.cat([part.float() for part in parts], dim=1))

    def compute(self) -> PreferenceReport:
        """Report on all pairs seen, on the CPU."""
        ids, columns = self._each_once()
        tie = columns[:, 4] == 0.5
        ids, columns = ids[~tie], columns[~tie]
        # Margin, chosen and rejected by member, then the two means.
        members, means = columns[:, 7:-2].unflatten(1, (3, -1)), columns[:, -2:, None]
        margin = RewardEstimate(columns[:, 0], columns[:, 1], members[:, 0] if members.shape[2] else None)
        responses = torch.cat([members[:, 1:], means], dim=2)
        return PreferenceReport(ids, margin, columns[:, 2:4], int(tie.sum()), responses, columns[:, 5:7])


class ResponseMetrics(Metric):
    """Collects the records of responses over batches and processes; `compute` gives them all to every process.

    Samplers repeat rows to give every process as many; so each response of each prompt counts once, by its first
    occurrence. A prompt that a file holds twice is one prompt.
    """

    full_state_update = False
    text: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        # Processes exchange tensors: the records travel as the bytes of their JSON lines.
        self.add_state("text", default=[], dist_reduce_fx="cat")

    def update(self, records: Sequence[dict[str, Any]]) -> None:
        """Add the records of some responses, as `sample_rows` makes them."""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        self.text.append(torch.frombuffer(bytearray(lines, "ascii"), dtype=torch.uint8).to(self.device))

    def compute(self) -> list[dict[str, Any]]:
        """All records, in the order in which they came, process by process."""
        lines = bytes(dim_zero_cat(self.text).cpu().numpy()).splitlines()
        first: dict[tuple[int, int], dict[str, Any]] = {}
        for record in map(json.loads, lines):
            first.setdefault((record["prompt_id"], record["response_number"]), record)
        return list(first.values())


def _own_rows(x: Tensor) -> Tensor:
    return x


def response_columns(rollout: Rollout) -> dict[str, Tensor]:
    """The numbers of each response of a rollout, by the names of `evaluation.policy_report.COLUMNS`, and its parts.

    All are (B,) but `members`, which is (B, K). A part NAME of the estimate has `reward_NAME`, and `sigma_NAME` if it
    knows its variance.
    """
    mask, estimate = rollout.response_mask, rollout.estimate
    columns: dict[str, Tensor | None] = {
        "reward": estimate.mean,
        "sigma": estimate.sigma,
        "objective_reward": rollout.reward,
        "kl": rollout.log_ratio,
        "kl_weight": rollout.kl_weight,
        "entropy": masked_mean(rollout.entropy, mask, dim=1),
        "length": mask.sum(1).float(),
        "stopped": rollout.stopped.float(),
        "gold": rollout.gold,
        "members": estimate.members,
        **rollout.marks,
    }
    found = {name: column for name in COLUMNS if (column := columns.get(name)) is not None}
    for name, part in (estimate.parts or {}).items():
        found[f"{PART_REWARD}{name}"] = part.mean
        if part.members is None or part.members.shape[1] > 1:
            found[f"{PART_SIGMA}{name}"] = part.sigma
    return found


def rollout_statistics(rollout: Rollout, all_rows: Callable[[Tensor], Tensor] = _own_rows) -> dict[str, Tensor]:
    """Figures of the responses of a rollout, and of their sampler if that says what it did; each a scalar.

    Args:
        rollout: Responses of this process.
        all_rows: Gives the rows of all processes for those of this one; without it, figures are of this one's.
    """
    found = response_statistics({name: all_rows(column) for name, column in response_columns(rollout).items()})
    if rollout.sampler is not None:
        found |= {f"sampler_{name}": x for name, x in rollout.sampler._asdict().items()}
    if rollout.token_kl is not None:
        found["kl_exact"] = all_rows(masked_sum(rollout.token_kl, rollout.response_mask, dim=1)).mean()
    return found


def speeds(rollout: Rollout, total: float) -> dict[str, Tensor]:
    """Response tokens of this process per second, of an iteration that took so many in all and of its phases."""
    tokens = float(rollout.response_mask.sum())
    phases = {f"{phase}_tokens_per_second": torch.tensor(tokens / x) for phase, x in rollout.seconds.items()}
    return {"tokens_per_second": torch.tensor(tokens / total), **phases}


def sample_rows(rollout: Rollout, policy: str, prompt_ids: Tensor) -> list[dict[str, Any]]:
    """One record for each response: whose it is, texts, and its numbers, with the score of every member.

    Further columns of the prompts' file stand under `columns`, so that none passes for a number of ours.

    Args:
        rollout: The responses, those to one prompt together.
        policy: Who gave them: `policy` or `reference`.
        prompt_ids: Identity of each prompt (P,), of which each has `rollout.num_responses`.
    """
    each = rollout.num_responses
    columns = {name: column.detach().double().cpu() for name, column in response_columns(rollout).items()}
    records = []
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        record: dict[str, Any] = {
            "policy": policy,
            "prompt_id": int(prompt_ids[i // each]),
            "response_number": i % each,
            "prompt": prompt,
            "response": response,
            **{name: _shown(column[i].tolist()) for name, column in columns.items()},
            "stopped": bool(rollout.stopped[i]),
            "length": int(columns["length"][i]),
        }
        # Tables count on it, and an estimator without members has none.
        record.setdefault("members", [])
        if rollout.columns:
            record["columns"] = {name: column[i] for name, column in rollout.columns.items()}
        records.append(record)
    return records


def _shown(value: Any) -> Any:
    """Numbers to seven digits, which is what single precision holds."""
    return [_shown(inner) for inner in value] if isinstance(value, list) else float(f"{value:.7g}")
