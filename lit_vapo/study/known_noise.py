"""Level 2 with planted noise: the members' scores are the truth plus noise whose variance is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from lit_vapo.objectives.base import Objective
from lit_vapo.study.language import LanguageModelStudy, Training
from lit_vapo.study.tabular import settings_grid
from lit_vapo.study.true_reward import TrueReward
from lit_vapo.uncertainty.base import RewardHead

DIRECTIONS = 8  # principal components that kinds and noise are made of


class PlantedNoise(RewardHead):
    """Members that know the truth but for an error of a known size, which depends on the kind of response.

        r_k(y) = R*(y) + σ_g · (√ρ · e_0g(y) + √(1 − ρ) · e_kg(y)),    e(y) = (a + b·z(y)/√d) / √2

    with g the kind of y (the nearest of G centres), z(y) its d coordinates, whitened over responses of the reference,
    and a, b standard normal numbers of the repetition for each kind and member. Over repetitions an error has mean 0
    and variance σ_g²·(1 + |z|²/d)/2. Within a kind it is a smooth function of the text, so a policy can exploit it.

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
            "centres": (kinds, d),
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
        return torch.cdist(self.coordinates(features), self.centres).argmin(1)

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
        """Take over the truth, and divide the reference's responses into kinds: k-means on their coordinates."""
        reference = true.reference
        self.weight.copy_(true.weight)
        self.bias.copy_(true.bias)
        self.loc.copy_(reference.mean(0))
        scale = reference.std(0)
        _, _, axes = torch.linalg.svd((reference - self.loc) / scale, full_matrices=False)
        whiten = axes[: self.directions].T / scale[:, None]
        self.whiten.copy_(whiten / ((reference - self.loc) @ whiten).std(0))
        # Signs of principal components differ between machines; kinds are counted by their share, which does not.
        z = self.coordinates(reference).double().numpy()
        centres, labels = kmeans2(z, self.kinds, minit="++", rng=np.random.default_rng(seed))
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

    The standard deviations σ_g of the kinds' noise are evenly spaced in the logarithm, dealt to the kinds at random
    once (the same in all repetitions), and scaled so that their mean square over responses of the reference is
    `noise`²: settings differ in how unequal the noise is and not in how much there is.

    Args:
        prepared: Folder with language model, prompts and true reward (see `LanguageModelStudy`).
        methods: What each method maximises, by name.
        noise_ratio: Ratios of the largest σ_g to the smallest, one setting each; 1 is the control.
        training: How all methods train.
        members: K.
        kinds: G.
        noise: Root mean square of one member's error, in standard deviations of the true reward.
        correlation: Share ρ of the noise's variance that all members have in common, in [0, 1).
        world: Which kinds there are and which are noisy.
    """

    def __init__(
        self,
        prepared: str,
        methods: dict[str, Objective],
        noise_ratio: list[float],
        training: Training | None = None,
        members: int = 8,
        kinds: int = 12,
        noise: float = 4.0,
        correlation: float = 0.0,
        world: int = 0,
    ) -> None:
        super().__init__(prepared, methods, training)
        self._settings = settings_grid(noise_ratio=noise_ratio)
        self.members = members
        self.kinds = kinds
        self.noise = noise
        self.correlation = correlation
        self.world = world

    @property
    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """The ratio of each setting."""
        return self._settings

    def ensemble(self, params: Mapping[str, Any], seed: int) -> PlantedNoise:
        """Truth and noise."""
        head = PlantedNoise(self.members, self.kinds)
        head.build(self.true.reference.shape[1])
        head.find_kinds(self.true, self.world)
        share = torch.bincount(head.kind(self.true.reference), minlength=self.kinds) / len(self.true.reference)
        ranks = np.random.default_rng(self.world).permutation(np.geomspace(1, params["noise_ratio"], self.kinds))
        sigma = torch.from_numpy(ranks)
        head.draw_errors(sigma * self.noise / (share @ sigma.square()).sqrt(), self.correlation, seed)
        head.calibrate(self.true.reference)
        return head
