"""Saved ensembles with a file changed: they score as they did, or they are refused."""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from lit_vapo.models.pretrained import Pretrained, decoder_layers, load_backbone
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.members.bayesian import BayesianLinear
from lit_vapo.rewards.members.dropout import McDropout
from lit_vapo.rewards.members.full import FullEnsemble
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from tests.generated import world
from tests.generated.folders import CHANGES, Change, changed
from tests.generated.outcome import Kind, WrongError

WIDTH = 32
HEADS = {
    "heads": lambda: HeadEnsemble(3),
    "bayesian": lambda: BayesianLinear(3),
    "dropout": lambda: McDropout(3),
    "lora": lambda: LoraEnsemble(2, rank=2),
    "full": lambda: FullEnsemble(2),
}


class Case(NamedTuple):
    """An estimator, and what is done to its folder."""

    head: str
    change: Change


CASES = st.builds(Case, st.sampled_from(sorted(HEADS)), CHANGES)


@functools.cache
def ensemble(name: str) -> str:
    """Folder of a sound ensemble, random and calibrated."""
    head: RewardHead = HEADS[name]()
    head.build(WIDTH)
    base = load_backbone(Pretrained(world.model()))
    model = RewardModel(FeatureSpec(Pretrained(world.model())), head, head.attach(base, decoder_layers(base)))
    generator = torch.Generator().manual_seed(1)
    shape = (32, WIDTH) if head.shares_features else (32, head.num_members, WIDTH)
    head.calibrate(torch.randn(shape, generator=generator))
    model.save_pretrained(world.root() / f"ensemble_{name}")
    return str(world.root() / f"ensemble_{name}")


def scores(folder) -> torch.Tensor:
    """Members' rewards of a few sequences."""
    model = RewardModel.from_pretrained(folder)
    ids = torch.arange(24).view(3, 8) + 5
    estimate = model(ids, torch.tensor([8, 7, 6]), torch.tensor([2, 2, 2]))
    return torch.cat([estimate.mean, estimate.variance])


@functools.cache
def sound(name: str) -> torch.Tensor:
    """What the unchanged one says."""
    return scores(ensemble(name))


def check_ensemble(case: Case, folder: Path) -> None:
    """Load the ensemble and score."""
    file = changed(ensemble(case.head), folder / "ensemble", case.change)
    got = scores(folder / "ensemble")
    if not torch.isfinite(got).all() or (got[len(got) // 2 :] < 0).any():
        raise WrongError(f"{file}: scores {got}")
    if not case.change.signed and not torch.equal(got, sound(case.head)):
        raise WrongError(f"{file}: expected the scores {sound(case.head)}, got {got}")


KINDS = [Kind("ensembles", CASES, check_ensemble, 4)]
