"""Learned rewards, exact optima: ensembles that learn from people, and responses whose true return is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_vapo.models.tensors import write_tensors
from lit_vapo.objectives.base import Objective
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.study.experiment import Experiment, Record, Repetition, expect
from lit_vapo.study.experiments.learner import Learner, draw_stated, examine, preference_settings
from lit_vapo.study.experiments.optimal_course import optimal_course
from lit_vapo.types import FeaturePairs

NAME = "responses.safetensors"
# Of β at the points of a run, in powers of 2: near enough for lines between them, where effects are a hundredth.
EXPONENTS = [k / 4 for k in range(28, -17, -1)]


class KnownResponses(NamedTuple):
    """Responses whose worth is known, and preferences between others to learn from.

    Attributes:
        responses: Features (P, N, H) of N responses to each of P prompts.
        true: What each is truly worth (P, N).
        chosen: Features (M, H) of the better response of each preference, to other prompts.
        rejected: Of the worse one.
    """

    responses: Tensor
    true: Tensor
    chosen: Tensor
    rejected: Tensor

    def save(self, folder: str | Path) -> None:
        """Write them into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_tensors(Path(folder) / NAME, self._asdict())

    @classmethod
    def load(cls, folder: str | Path) -> KnownResponses:
        """Read them from a folder.

        Raises:
            ValueError: There are none, or their shapes do not go together.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            raise ValueError(f"prepared: expected a folder with {NAME}, got {str(folder)!r}")
        known = cls(**load_file(path))
        shapes = {name: tuple(x.shape) for name, x in known._asdict().items()}
        prompts, count, width = (*shapes["responses"], 0, 0, 0)[:3]
        right = {"responses": (prompts, count, width), "true": (prompts, count)}
        right |= dict.fromkeys(("chosen", "rejected"), (len(known.chosen), width))
        expect(str(path), shapes, shapes == right, "responses (P, N, H), true (P, N), chosen and rejected (M, H)")
        return known


class ResponseOptima(Experiment):
    """The exact optimum of each objective over N known responses to each prompt, with ensembles that are learned.

    The reference is uniform over the N responses, as it is over its own samples; a policy moves probability between
    them. Its KL and its true return are means over the prompts. So nothing is due to optimisation, as in `Optima`, but
    the errors are those of reward models that learned from preferences of people: every repetition draws its own, turns
    round each with the probability `flipped`, and has a new initialisation and bootstrap.

    A run's points are the optima at coefficients that fall from 128 β to β/16, four to a halving. The one at β is the
    final policy, which is compared at equal β. No KL exceeds log N.

    Args:
        prepared: Folder with `KnownResponses`.
        methods: What each method maximises, by name; objectives that depend on the estimate of each response alone.
        pairs: Numbers of preferences. Settings are all combinations of the lists, and of the estimators.
        flipped: Probabilities that a preference is stated the wrong way round, in [0, 0.5].
        heads: The estimators by name; their seed is the repetition's.
        steps: Steps of an estimator's optimiser, each on all pairs.
        head_learning_rate: Its first learning rate.
        kl_coef: β, in units of reward per nat.
        block_size: Repetitions in one file.

    Raises:
        ValueError: There are no methods, or a number is out of its range.
    """

    def __init__(
        self,
        prepared: str,
        methods: dict[str, Objective],
        pairs: list[int],
        flipped: list[float],
        heads: dict[str, RewardHead] | None = None,
        steps: int = 200,
        head_learning_rate: float = 0.01,
        kl_coef: float = 1.0,
        block_size: int = 10,
    ) -> None:
        expect("methods", "none", bool(methods), "at least one")
        expect("kl_coef", kl_coef, kl_coef > 0, "a number > 0")
        self.prepared = Path(prepared)
        self.methods = methods
        heads = heads or {"HeadEnsemble": HeadEnsemble(10)}
        self.learners = {name: Learner(head, steps, head_learning_rate) for name, head in heads.items()}
        grid = preference_settings(pairs, flipped)
        self.settings = {
            f"{name},{key}" if len(heads) > 1 else key: params | {"head": name}
            for name in heads
            for key, params in grid.items()
        }
        self.kl_coef = kl_coef
        self.block_size = block_size

    @cached_property
    def known(self) -> KnownResponses:
        """What was prepared."""
        return KnownResponses.load(self.prepared)

    def run_block(self, setting: str, repetitions: Sequence[Repetition]) -> list[Record]:
        """One ensemble for each repetition, every method."""
        return [record for repetition in repetitions for record in self._repeat(setting, repetition)]

    def preferences(self, pairs: int, flipped: float, seed: int) -> FeaturePairs:
        """What the ensemble of a repetition learns from, without repetition.

        Raises:
            ValueError: There are fewer.
        """
        return draw_stated(self.known.chosen, self.known.rejected, pairs, flipped, seed)

    def _repeat(self, setting: str, repetition: Repetition) -> list[Record]:
        params, responses = self.settings[setting], self.known.responses
        pairs = self.preferences(params["pairs"], params["flipped"], repetition.seed)
        head = self.learners[params["head"]].learn(pairs, responses.flatten(0, 1), repetition.seed)
        return optima(self.methods, head, responses, self.known.true, self.kl_coef, setting, repetition)


@torch.no_grad()
def optima(
    methods: Mapping[str, Objective],
    head: RewardHead,
    responses: Tensor,
    true: Tensor,
    kl_coef: float,
    setting: str,
    repetition: Repetition,
) -> list[Record]:
    """The exact optima of all methods, with one ensemble.

    Args:
        methods: What each method maximises, by name.
        head: The ensemble, calibrated.
        responses: Features (P, N, H) of N responses to each of P prompts, between which the reference is uniform.
        true: What each is truly worth (P, N).
        kl_coef: β of the final policy, in units of reward per nat.
        setting: Name of the setting.
        repetition: Which repetition it is.
    """
    estimate, true = head(responses.flatten(0, 1)), true.double()
    estimate = estimate._replace(reference_variance=head.reference_variance)
    known = examine(estimate.mean.view(true.shape), estimate.variance.view(true.shape), true)
    reference = torch.full_like(true, 1 / true.shape[1])
    base = float((reference * true).sum(1).mean())
    coefs = kl_coef * torch.tensor(EXPONENTS, dtype=torch.float64).exp2()
    records = []
    for name, objective in methods.items():
        objective.prepare(head.num_members)
        score = objective(estimate)
        reward, weight = (x.double().view(true.shape) for x in (score.reward, score.kl_weight))
        kl, value = (x.mean(1).tolist() for x in optimal_course(reward, weight, reference, true, coefs))
        records.append(Record(name, setting, *repetition, kl, value, base, known, EXPONENTS.index(0)))
    return records
