"""Level 2 with planted noise: the members' scores are the truth plus noise whose variance is known."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from lit_vapo.objectives.base import Objective
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.study.experiment import expect, settings_grid
from lit_vapo.study.experiments.language import LanguageModelStudy, Training
from lit_vapo.study.experiments.truth import TrueReward

DIRECTIONS = 4  # coordinates that kinds and noise are made of


class PlantedNoise(RewardHead):
    """Members that know the truth but for an error of a known size, which depends on the kind of response.

        r_k(y) = R*(y) + σ_g · (√ρ · e_0g(y) + √(1 − ρ) · e_kg(y)),    e(y) = (a + b·z(y)/√d) / √2

    with z(y) the d coordinates of y, g its kind, and a, b standard normal numbers of the repetition for each kind and
    member. Over repetitions an error has mean 0 and variance σ_g²·(1 + |z|²/d)/2. Within a kind it is a smooth function
    of the text, so a policy can exploit it.

    The first coordinate is the score that R* is the tanh of; the others are the principal components of what is left of
    the features without it. All have variance 1 over responses of the reference. The kind is the nearest of G centres
    in these others: noisy kinds are then neither the good nor the bad ones.

    Args:
        num_members: K.
        kinds: G.
        directions: d.
    """

    weight: Tensor
    bias: Tensor
    loc: Tensor
    whiten: Tensor
    centres: Tensor
    offset: Tensor
    slope: Tensor

    def __init__(self, num_members: int, kinds: int, directions: int = DIRECTIONS) -> None:
        super().__init__(num_members, bootstrap=False)
        self.kinds = kinds
        self.directions = directions

    def make_parameters(self, hidden_size: int) -> None:
        """Room for the truth, the kinds and the errors; nothing is learned."""
        kinds, K, d = self.kinds, self.num_members, self.directions
        shapes = {
            "weight": (hidden_size,),
            "bias": (),
            "loc": (hidden_size,),
            "whiten": (hidden_size, d),
            "centres": (kinds, d - 1),
            "offset": (kinds, K),
            "slope": (kinds, d, K),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def coordinates(self, features: Tensor) -> Tensor:
        """Coordinates z (B, d) of features (B, H)."""
        return (features - self.loc) @ self.whiten

    def kind(self, features: Tensor) -> Tensor:
        """Number (B,) of the kind of each response."""
        return torch.cdist(self.coordinates(features)[:, 1:], self.centres).argmin(1)

    def rewards(self, features: Tensor) -> Tensor:
        """Truth and error (B, K)."""
        z, kind = self.coordinates(features), self.kind(features)
        error = self.offset[kind] + torch.einsum("bd,bdk->bk", z, self.slope[kind])
        return TrueReward(self.weight, self.bias, features)(features)[:, None] + error

    def fit_normaliser(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """None is needed: all members have the truth's origin and unit."""
        return torch.zeros(self.num_members), torch.ones(self.num_members)

    @torch.no_grad()
    def find_kinds(self, true: TrueReward, seed: int) -> None:
        """Take over the truth, and divide the reference's responses into kinds by k-means."""
        reference = true.reference
        self.weight.copy_(true.weight)
        self.bias.copy_(true.bias)
        self.loc.copy_(reference.mean(0))
        centred, scale = reference - self.loc, reference.std(0)
        score = centred @ true.weight
        # What is left of each standardised feature once the score is taken out of it.
        shared = (centred / scale * score[:, None]).mean(0) / score.square().mean()
        _, _, axes = torch.linalg.svd(centred / scale - score[:, None] * shared, full_matrices=False)
        others = axes[: self.directions - 1].T
        self.whiten.copy_(
            torch.cat([true.weight[:, None], others / scale[:, None] - true.weight[:, None] * (shared @ others)], 1)
        )
        self.whiten.div_((centred @ self.whiten).std(0))
        z = self.coordinates(reference)[:, 1:].double().numpy()
        centres, labels = kmeans2(z, self.kinds, minit="++", rng=np.random.default_rng(seed))
        # In an order that does not depend on how k-means numbers them.
        order = np.bincount(labels, minlength=self.kinds).argsort(kind="stable")
        self.centres.copy_(torch.from_numpy(centres[order]))

    @torch.no_grad()
    def draw_errors(self, sigma: Tensor, correlation: float, seed: int) -> None:
        """Draw the errors of a repetition, the common one first, so that further members change no other.

        Args:
            sigma: σ_g (G,).
            correlation: ρ.
            seed: Where they come from.
        """
        rng = np.random.default_rng(seed)
        draws = [rng.standard_normal((self.kinds, 1 + self.directions)) for _ in range(1 + self.num_members)]
        common, own = draws[0][..., None], np.stack(draws[1:], -1)
        error = sigma[:, None, None] * torch.from_numpy(correlation**0.5 * common + (1 - correlation) ** 0.5 * own)
        self.offset.copy_(error[:, 0] / 2**0.5)
        self.slope.copy_(error[:, 1:] / (2 * self.directions) ** 0.5)


class KnownNoise(LanguageModelStudy):
    """PPO against members that are the truth plus planted noise.

    Half of the kinds, drawn once for all repetitions, are noisy: their σ_g is `noise_ratio` times that of the quiet
    half. The mean square over responses of the reference is `noise`² at every ratio: settings differ in how unequal
    the noise is and not in how much there is.

    Args:
        prepared: Folder with language model, prompts and true reward (see `LanguageModelStudy`).
        methods: What each method maximises, by name.
        noise_ratio: Ratios of σ_g between noisy and quiet kinds, one setting each; 1 is the control.
        training: How all methods train.
        members: K.
        kinds: G.
        noise: Root mean square of one member's error, in units of the true reward (whose spread is about 1).
        correlation: Share ρ of the noise's variance that all members have in common, in [0, 1).
        world: Which kinds there are and which are noisy.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        prepared: str,
        methods: dict[str, Objective],
        noise_ratio: list[float],
        training: Training | None = None,
        members: int = 8,
        kinds: int = 4,
        noise: float = 4.0,
        correlation: float = 0.8,
        world: int = 0,
    ) -> None:
        super().__init__(prepared, methods, training)
        expect("noise_ratio", noise_ratio, all(x > 0 for x in noise_ratio), "ratios > 0")
        expect("members", members, members >= 1, "at least 1")
        expect("kinds", kinds, kinds >= 2, "at least 2, noisy and quiet")
        expect("noise", noise, noise > 0, "a number > 0")
        expect("correlation", correlation, 0 <= correlation < 1, "a number in [0, 1)")
        self.settings = settings_grid(noise_ratio=noise_ratio)
        self.members = members
        self.kinds = kinds
        self.noise = noise
        self.correlation = correlation
        self.world = world

    @cached_property
    def true(self) -> TrueReward:
        """The true reward that noise is planted on."""
        return TrueReward.load(self.prepared / "true_reward")

    @cached_property
    def kinds_of_response(self) -> PlantedNoise:
        """The truth and the kinds, without errors: the same in all repetitions."""
        head = PlantedNoise(self.members, self.kinds)
        head.build(self.true.reference.shape[1])
        head.find_kinds(self.true, self.world)
        return head

    def ensemble(self, params: Mapping[str, Any], seed: int) -> PlantedNoise:
        """Truth and noise."""
        head, reference = copy.deepcopy(self.kinds_of_response), self.true.reference
        share = torch.bincount(head.kind(reference), minlength=self.kinds).double() / len(reference)
        order = np.random.default_rng(self.world).permutation(self.kinds)
        sigma = torch.where(torch.from_numpy(order) < self.kinds // 2, 1.0, float(params["noise_ratio"])).double()
        head.draw_errors(sigma * self.noise / (share @ sigma.square()).sqrt(), self.correlation, seed)
        head.calibrate(reference)
        return head
