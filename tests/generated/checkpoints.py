"""Checkpoints with a part changed: what is exported from one is what was trained, or nothing is."""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from lit_vapo.cli import main
from tests.generated import world
from tests.generated.harm import BYTES, VALUES, change_bytes, change_value
from tests.generated.outcome import Kind, WrongError


class Changed(NamedTuple):
    """A checkpoint of a stage with its bytes changed, or one of the values in it."""

    stage: str
    how: tuple
    inside: bool


CASES = st.sampled_from(("sft", "reward", "ppo")).flatmap(
    lambda stage: st.one_of(
        st.builds(Changed, st.just(stage), BYTES, st.just(False)),
        st.builds(Changed, st.just(stage), VALUES, st.just(True)),
    )
)


def check_checkpoint(case: Changed, folder: Path) -> None:
    """Export it, and compare the weights with those of the sound one."""
    path = folder / "changed.ckpt"
    if case.inside:
        content = torch.load(world.checkpoint(case.stage), weights_only=True)
        torch.save(change_value(content, *case.how), path)
    else:
        path.write_bytes(change_bytes(Path(world.checkpoint(case.stage)).read_bytes(), *case.how))
    main(["export", f"--checkpoint={path}", f"--output={folder / 'out'}"])
    got, expected = weights(folder / "out"), sound(case.stage)
    differ = [name for name in got.keys() | expected.keys() if not same(got.get(name), expected.get(name))]
    if differ:
        raise WrongError(f"exported other weights than were trained: {sorted(differ)[:3]}")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors below a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.relative_to(folder)}: {name}": value for path in files for name, value in load_file(path).items()}


@functools.cache
def sound(stage: str) -> dict[str, torch.Tensor]:
    """What is exported from the unchanged one."""
    return weights(Path(world.exported(stage)))


def same(one, other) -> bool:
    """Whether two tensors are there and equal."""
    return one is not None and other is not None and torch.equal(one, other)


KINDS = [Kind("checkpoints", CASES, check_checkpoint, 4)]
