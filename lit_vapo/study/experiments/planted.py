"""Planted noise without PPO: exact optima over responses of the tiny language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lit_vapo.objectives.base import Objective
from lit_vapo.study.experiment import Experiment, Record, Repetition, expect
from lit_vapo.study.experiments.noise import KnownNoise
from lit_vapo.study.experiments.responses import optima


class PlantedOptima(Experiment):
    """What PPO would find against planted noise if it found the optimum: `KnownNoise` with exact optima.

    Truth, kinds and errors are those of `KnownNoise`. The reference has one response to each prompt: N of them, of
    different prompts, stand for the responses to one, and the reference is uniform over these.

    Args:
        prepared: Folder with `true_reward`.
        methods: What each method maximises, by name; objectives that depend on the estimate of each response alone.
        noise_ratio: As of `KnownNoise`, and all that is not said otherwise.
        members: K.
        kinds: G.
        noise: Root mean square of one member's error.
        correlation: Share of the noise's variance that all members have in common.
        world: Which kinds there are, which are noisy, and which responses stand together.
        responses: N.
        kl_coef: β of the final policy, in units of reward per nat.
        block_size: Repetitions in one file.

    Raises:
        ValueError: There are no methods, or a number is out of its range.
    """

    def __init__(
        self,
        prepared: str,
        methods: dict[str, Objective],
        noise_ratio: list[float],
        members: int = 8,
        kinds: int = 4,
        noise: float = 4.0,
        correlation: float = 0.8,
        world: int = 0,
        responses: int = 32,
        kl_coef: float = 1.0,
        block_size: int = 10,
    ) -> None:
        expect("responses", responses, responses >= 2, "at least 2")
        expect("kl_coef", kl_coef, kl_coef > 0, "a number > 0")
        self.planted = KnownNoise(prepared, methods, noise_ratio, None, members, kinds, noise, correlation, world)
        self.methods = methods
        self.settings = self.planted.settings
        self.responses = responses
        self.kl_coef = kl_coef
        self.block_size = block_size

    @cached_property
    def features(self) -> Tensor:
        """Features (P, N, H) of responses of the reference; those that fill no prompt are left out."""
        reference = self.planted.true.reference
        order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(self.planted.world))
        prompts = len(reference) // self.responses
        return reference[order[: prompts * self.responses]].unflatten(0, (prompts, self.responses))

    def run_block(self, setting: str, repetitions: Sequence[Repetition]) -> list[Record]:
        """One ensemble for each repetition, every method."""
        true = self.planted.true(self.features.flatten(0, 1)).view(self.features.shape[:2])
        records = []
        for repetition in repetitions:
            head = self.planted.ensemble(self.settings[setting], repetition.seed)
            records += optima(self.methods, head, self.features, true, self.kl_coef, setting, repetition)
        return records
