"""From which data and models a finished run has made which policy or ensemble, for trackers that draw it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_vapo.callbacks.checkpoint import RunCheckpoint
from lit_vapo.callbacks.checkpoint_files import BEST, LAST
from lit_vapo.models.origin import Origin, read_origin
from lit_vapo.trackers import Traced, draws_lineage, log_lineage

# What the stages make, and what the keys of settings name; other keys name models.
MADE = {"sft": "policy", "reward": "ensemble", "ppo": "policy"}
NAMED = {"data.tokenizer": "tokenizer", "data.": "data", "model.reward": "ensemble", "model.policy": "policy"}
# So much of a digest is in a name.
LETTERS = 16


class Lineage(Callback):
    """Tells W&B what a finished run has read and made, if it logs there.

    Everything is known by a digest, so that what one run makes and another reads has one name. An exported folder goes
    by the checkpoint that it was made of, since that is what a run makes.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell it, now that the last checkpoint is there."""
        if not (trainer.is_global_zero and draws_lineage(trainer.loggers)):
            return
        checkpoint = next(x for x in cast("Any", trainer).callbacks if isinstance(x, RunCheckpoint))
        module = cast("Any", pl_module)
        folders = module.folders()
        read = [_read(key, digest, folders.get(key)) for key, digest in checkpoint.state.reads.items()]
        log_lineage(trainer.loggers, _once(read), _once(_made(module.stage, checkpoint.folder)))


def _read(key: str, digest: str, folder: Path | None) -> Traced:
    """What a run has read, by the key of the setting that names it."""
    origin = None if folder is None else read_origin(folder)
    if origin is not None:
        return _of(origin, f"{key}: {folder}")
    kind = next((kind for start, kind in NAMED.items() if key.startswith(start)), "model")
    short = digest.removeprefix("commit ")[:LETTERS]
    return Traced(f"{kind}-{short}", kind, {"digest": digest}, key if folder is None else f"{key}: {folder}")


def _made(stage: str, checkpoints: Path) -> Iterator[Traced]:
    """What a run has made: its last checkpoint, and its best."""
    for name in (LAST, BEST):
        path = checkpoints / name
        if path.exists():
            yield _of(Origin.of(stage, path), str(path.resolve()))._replace(aliases=(path.stem,))


def _of(origin: Origin, note: str) -> Traced:
    kind = MADE.get(origin.stage, "model")
    return Traced(f"{kind}-{origin.checkpoint[:LETTERS]}", kind, origin.model_dump(), note)


def _once(things: Iterable[Traced]) -> list[Traced]:
    """Each thing once, with all its aliases and notes."""
    found: dict[str, Traced] = {}
    for thing in things:
        former = found.get(thing.name, thing)
        note = "\n".join(dict.fromkeys([*former.note.split("\n"), thing.note]))
        found[thing.name] = thing._replace(note=note, aliases=tuple(dict.fromkeys([*former.aliases, *thing.aliases])))
    return list(found.values())
