"""An alarm that needs no judge: do responses, or members' doubts about them, leave what the reference shows?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Size, Tensor, nn

from lit_vapo.advantages.base import Reduce
from lit_vapo.functional import Spread, fit_spread, held_out_distances, outlier_bound, squared_distance
from lit_vapo.ranges import OpenUnitInterval, PositiveFloat, PositiveInt, check_ranges
from lit_vapo.types import RewardEstimate

DISTANCE, SIGMA = "distance", "relative_sigma"


@dataclass
class AlarmSettings:
    """What is watched for responses unlike the reference's, and when that ends a run.

    Args:
        level: Share of the reference's own responses that may lie beyond the bound: how often a response is a false
            alarm.
        stop_share: End the run once more than this share of an iteration's responses lie beyond the bound; `null` for
            never.
        stop_sigma: End the run once members disagree this many times as much as on the reference, on average; `null`
            for never.
        patience: So many iterations in a row it takes to end a run.
    """

    level: OpenUnitInterval = 0.01
    stop_share: OpenUnitInterval | None = None
    stop_sigma: PositiveFloat | None = None
    patience: PositiveInt = 3

    def __post_init__(self) -> None:
        check_ranges(AlarmSettings, vars(self), "model.alarm.")
        if self.stop_share is not None and self.stop_share <= self.level:
            raise ValueError(f"model.alarm.stop_share: expected more than level = {self.level}, got {self.stop_share}")


class Alarm(nn.Module):
    """Compares responses with the reference's, by the features that members read and by what they disagree about.

    The distance of a response is its squared Mahalanobis distance from the reference's responses, in units of a bound
    beyond which a share `level` of the reference's own lies (`functional.outlier_bound`): an outlier has more than 1.
    After the Mahalanobis outlier probability of Miao et al., arXiv 2510.13694, which takes features of a bottleneck
    for it. Its σ is told in units of the reference's mean σ.

    All of it is in buffers, so that checkpoints hold it; of features that nobody has seen yet they are empty.

    Args:
        settings: What is watched, and when that ends a run.

    Attributes:
        mean: As in `functional.Spread`; empty where the source of rewards reads no features.
        directions: The same.
        gains: The same.
        floor: The same.
        bound: Squared distance beyond which a response is an outlier ().
        sigma: Mean σ on the reference's responses (); 0 where members do not disagree.
        fitted: Whether the reference's responses were seen ().
        ringing: Iterations in a row that were over a limit ().
    """

    mean: Tensor
    directions: Tensor
    gains: Tensor
    floor: Tensor
    bound: Tensor
    sigma: Tensor
    fitted: Tensor
    ringing: Tensor

    def __init__(self, settings: AlarmSettings) -> None:
        super().__init__()
        self.settings = settings
        for name in ("mean", "gains"):
            self.register_buffer(name, torch.zeros(0))
        self.register_buffer("directions", torch.zeros(0, 0))
        for name in ("floor", "bound", "sigma"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("ringing", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def fit(self, estimates: Sequence[RewardEstimate]) -> None:
        """Learn what the reference's responses look like.

        Args:
            estimates: What the source of rewards says of them, batch by batch.

        Raises:
            ValueError: The source says nothing that could be watched, or nothing of what is to end a run.
        """
        features = [x.features for x in estimates if x.features is not None]
        sigma = torch.cat([x.sigma for x in estimates]).mean()
        settings = self.settings
        if not features and (settings.stop_share is not None or not sigma > 0):
            key = "alarm" if settings.stop_share is None else "alarm.stop_share"
            raise ValueError(
                f"model.{key}: expected a source of rewards with features (an ensemble that lit-vapo trained), got one "
                "without" + ("" if sigma > 0 else ", and without a variance")
            )
        if settings.stop_sigma is not None and not sigma > 0:
            raise ValueError("model.alarm.stop_sigma: expected members that disagree on the reference, got σ = 0")
        found = {"sigma": sigma, "fitted": torch.ones_like(self.fitted), "ringing": torch.zeros_like(self.ringing)}
        if features:
            rows = torch.cat(features)
            found |= fit_spread(rows)._asdict()
            found["bound"] = outlier_bound(held_out_distances(rows), settings.level)
        self.take(found)

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Take buffers, whatever their shapes were."""
        for name, value in state.items():
            # As a checkpoint gives them back: products of other strides may differ in the last bit.
            setattr(self, name, value.to(getattr(self, name)).contiguous())

    def make_room(self, shapes: Mapping[str, Size]) -> None:
        """Have buffers of these shapes, for a checkpoint that is about to be read."""
        self.take({name: torch.zeros(shape) for name, shape in shapes.items()})

    @torch.no_grad()
    def marks(self, estimate: RewardEstimate) -> dict[str, Tensor]:
        """What is noted of each response, by name: `distance` (B,) and `relative_sigma` (B,), as far as there are such.

        Args:
            estimate: What the source of rewards says of B responses.
        """
        found = {}
        if estimate.features is not None and len(self.mean):
            spread = Spread(self.mean, self.directions, self.gains, self.floor)
            found[DISTANCE] = (squared_distance(estimate.features, spread) / self.bound).float()
        if self.sigma > 0:
            found[SIGMA] = (estimate.sigma / self.sigma).float()
        return found

    def rings(self, marks: Mapping[str, Tensor], all_sum: Reduce, iteration: int) -> bool:
        """Count an iteration of training, and tell whether the run should end with it; says so if it should.

        Args:
            marks: What was noted of its responses.
            all_sum: Sum of a tensor over all processes.
            iteration: Number of the iteration, from 1.
        """
        limits = {DISTANCE: self.settings.stop_share, SIGMA: self.settings.stop_sigma}
        over = []
        for name, limit in limits.items():
            if limit is None or name not in marks:
                continue
            values = (marks[name] > 1).float() if name == DISTANCE else marks[name]
            mean = float(all_sum(values.sum()) / all_sum(torch.ones_like(values).sum()))
            if mean > limit:
                over.append(f"{_told(name)} is {mean:.3g}, above {limit:g}")
        self.ringing.copy_(self.ringing + 1 if over else torch.zeros_like(self.ringing))
        if int(self.ringing) < self.settings.patience:
            return False
        said = f"{' and '.join(over)}, for {int(self.ringing)} iterations in a row"
        rank_zero_info(
            f"iteration {iteration}: {said}: this iteration's update is not taken, and the run stops (model.alarm)"
        )
        return True


def _told(name: str) -> str:
    if name == DISTANCE:
        return "the share of responses that are unlike the reference's"
    return "the members' disagreement, in that on the reference's responses,"
