"""Exported policies with a file changed: a run starts from the policy that was exported, or is refused."""

import functools
from pathlib import Path

import torch

from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.exported import check_policy
from lit_vapo.models.pretrained import Pretrained
from tests.generated import world
from tests.generated.folders import CHANGES, Change, changed
from tests.generated.outcome import Kind, WrongError


def networks(folder: str) -> dict[str, torch.Tensor]:
    """What a run that starts from a policy would train."""
    torch.manual_seed(0)
    base = Pretrained(world.model())
    nets = ActorCritic(base, check_policy(folder, base, None), CriticSpec(), folder)
    return {str(i): x.detach() for i, x in enumerate([*nets.actor_parameters(), *nets.critic_parameters()])}


@functools.cache
def sound() -> dict[str, torch.Tensor]:
    """The same of the unchanged one."""
    return networks(world.exported("ppo"))


def check_changed(change: Change, folder: Path) -> None:
    """Start from the policy."""
    file = changed(world.exported("ppo"), folder / "policy", change)
    got, expected = networks(str(folder / "policy")), sound()
    if not all(torch.isfinite(x).all() for x in got.values()):
        raise WrongError(f"{file}: starts from weights that are not finite")
    if not change.signed and not all(torch.equal(x, got[name]) for name, x in expected.items()):
        raise WrongError(f"{file}: starts from other weights than were exported")


KINDS = [Kind("policies", CHANGES, check_changed, 2)]
