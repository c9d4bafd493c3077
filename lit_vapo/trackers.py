"""Trackers: loggers whose failure ends no run, and all that is said to Weights & Biases by its own name."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn

# Seconds that W&B may keep a run waiting for its server, at the beginning (it takes some 10 more to give up) and at the
# end. By itself it waits 90 there, and for ever here.
PATIENCE = {"WANDB_INIT_TIMEOUT": "40", "WANDB_FINISH_TIMEOUT": "120"}
# Seconds that its server has to answer a question.
ANSWER = 10
# Of an error's text, so much is shown.
LONGEST = 200


class Lasting(Logger):
    """A tracker that takes no run down: what fails in it is said once, and from then on it is left alone.

    Args:
        tracker: The logger that may fail. After it has, a logger that does nothing stands in its place.
    """

    def __init__(self, tracker: Logger) -> None:
        super().__init__()
        self.tracker = tracker
        if isinstance(tracker, WandbLogger):
            _be_patient()

    def guarded(self, call: Callable[[], Any]) -> Any:
        """What a call of the tracker gives, or `None` if it fails."""
        try:
            return call()
        except Exception as error:
            if isinstance(self.tracker, WandbLogger):
                atexit.register(_end_wandb)
            name, self.tracker = type(self.tracker).__name__, DummyLogger()
            rank_zero_warn(
                f"{name} failed ({type(error).__name__}: {_first_line(error)}) and is left alone from here on; the run "
                "goes on, and its metrics.csv and other files are complete"
            )
            return None

    @property
    def experiment(self) -> Any:
        """The tracker's own object, which is begun here if need be."""
        found = self.guarded(lambda: getattr(self.tracker, "experiment", None))
        return DummyLogger().experiment if found is None else found

    @property
    def name(self) -> str | None:
        """The tracker's."""
        return self.guarded(lambda: self.tracker.name)

    @property
    def version(self) -> int | str | None:
        """The tracker's."""
        return self.guarded(lambda: self.tracker.version)

    @property
    def save_dir(self) -> str | None:
        """The tracker's."""
        return self.guarded(lambda: self.tracker.save_dir)

    @property
    def root_dir(self) -> str | None:
        """The tracker's."""
        return self.guarded(lambda: self.tracker.root_dir)

    @property
    def log_dir(self) -> str | None:
        """The tracker's."""
        return self.guarded(lambda: self.tracker.log_dir)

    @property
    def group_separator(self) -> str:
        """The tracker's."""
        return self.tracker.group_separator

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Pass figures on."""
        self.guarded(lambda: self.tracker.log_metrics(*args, **kwargs))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Pass settings on."""
        self.guarded(lambda: self.tracker.log_hyperparams(*args, **kwargs))

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """Pass a model on."""
        self.guarded(lambda: self.tracker.log_graph(*args, **kwargs))

    def save(self) -> None:
        """Let the tracker write what it holds."""
        self.guarded(lambda: self.tracker.save())

    def finalize(self, status: str) -> None:
        """Tell the tracker how the run ended."""
        self.guarded(lambda: self.tracker.finalize(status))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Tell the tracker of a checkpoint."""
        self.guarded(lambda: self.tracker.after_save_checkpoint(checkpoint_callback))

    def __getattr__(self, name: str) -> Any:
        """What only this tracker can do; its methods are guarded, too."""
        if name.startswith("__") or name == "tracker":
            raise AttributeError(name)
        found = getattr(self.tracker, name)
        return (lambda *args, **kwargs: self.guarded(lambda: found(*args, **kwargs))) if callable(found) else found

    def __getstate__(self) -> dict[str, Any]:
        """Begin before other processes get a copy: W&B's logger does so in pickling, where nothing may fail."""
        _ = self.experiment
        return self.__dict__


def lasting(loggers: Sequence[Logger], folder: str) -> list[Logger]:
    """The loggers of a run, of which only those that write its own files can end it.

    Args:
        loggers: What was asked for.
        folder: Where `logs/version_N/metrics.csv` goes, if nobody asked for one.

    Returns:
        A CSV logger first, since the configuration goes into the first one's folder; then W&B, which must begin before
        TensorBoard to see what that writes; then all others.
    """
    csv = [logger for logger in loggers if isinstance(logger, CSVLogger)] or [CSVLogger(folder, name="logs")]
    others = sorted(
        (logger for logger in loggers if not isinstance(logger, CSVLogger)),
        key=lambda logger: not isinstance(logger, WandbLogger),
    )
    return [*csv, *(Lasting(logger) for logger in others)]


def run_ids(loggers: Iterable[Logger]) -> list[str]:
    """What W&B calls the run, for each of its loggers."""
    return [str(board.version) for board in _boards(loggers) if board.version is not None]


def go_on(loggers: Iterable[Logger], ids: Sequence[str]) -> None:
    """Let W&B go on with the runs of these names, where nobody has asked for another."""
    boards = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    for board, name in zip(boards, ids, strict=False):
        if board._wandb_init.get("id") is None:
            board._id = name
            board._wandb_init.update(id=name, resume="allow")


def log_table(loggers: Iterable[Logger], key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Show a table in W&B, where a run has it.

    Args:
        loggers: The loggers of a run.
        key: Its name.
        columns: Names of columns.
        rows: Cells, plain values.
    """
    for board in _boards(loggers):
        board.log_table(key, columns=list(columns), data=[list(row) for row in rows])


def log_picture(loggers: Iterable[Logger], key: str, path: Path) -> None:
    """Show a picture in W&B, where a run has it."""
    for board in _boards(loggers):
        board.log_image(key, [str(path)])


def log_configuration(loggers: Iterable[Logger], config: dict[str, Any]) -> None:
    """Keep a run's whole configuration in W&B, where a run has it; Lightning alone would give it the model's only."""
    for board in _boards(loggers):
        board.log_hyperparams({"lit_vapo": config})


class Member(NamedTuple):
    """One of several runs that are looked at together.

    Attributes:
        name: Its name.
        kind: What it has in common with some of the others.
        config: Its configuration.
        rows: Figures by key, point after point.
        end: Figures of the whole run.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    end: Mapping[str, float]


def log_group(project: str, folder: str, group: str, members: Sequence[Member]) -> None:
    """Log runs that are over to W&B, as one group; the same ones under the same names as before.

    Args:
        project: Project of W&B.
        folder: Where W&B keeps its files.
        group: Name of the group.
        members: The runs.
    """
    _be_patient()
    try:
        import wandb

        for member in members:
            what = json.dumps([group, *member], sort_keys=True, default=str)
            identity = hashlib.sha256(what.encode()).hexdigest()[:16]
            about: dict[str, Any] = {"group": group, "job_type": member.kind, "name": f"{member.kind}/{member.name}"}
            with wandb.init(
                project=project, dir=folder, id=identity, resume="allow", config=dict(member.config), **about
            ) as run:
                for step, row in enumerate(member.rows):
                    run.log(dict(row), step=step)
                run.summary.update(dict(member.end))
    except Exception as error:
        rank_zero_warn(f"W&B failed ({type(error).__name__}: {_first_line(error)}); what is in {folder} is complete")


class Traced(NamedTuple):
    """What a run reads or makes: a data set, a model, an ensemble, a policy.

    Attributes:
        name: The same for the same thing, whichever run it is; letters, digits, dashes.
        kind: What it is.
        content: What tells it from others.
        note: Where it is, for people.
        aliases: What the run calls it.
    """

    name: str
    kind: str
    content: Mapping[str, str]
    note: str
    aliases: tuple[str, ...] = ()


def draws_lineage(loggers: Iterable[Logger]) -> bool:
    """Whether a run has a tracker that draws what was made of what."""
    return bool(_boards(loggers))


def log_lineage(loggers: Iterable[Logger], read: Sequence[Traced], made: Sequence[Traced]) -> None:
    """Tell W&B, where a run has it, what the run has read and made, as artifacts that hold digests and no weights."""
    for board in _boards(loggers):
        board.guarded(partial(_log_artifacts, board.tracker, read, made))


def _log_artifacts(board: Any, read: Sequence[Traced], made: Sequence[Traced]) -> None:
    import wandb

    run = board.experiment
    if not run.offline:
        # An artifact that does not reach its server keeps the end of a run for a quarter of an hour, whatever patience
        # was asked for: so whether it answers is asked first.
        try:
            list(wandb.Api(timeout=ANSWER).artifact_types(f"{run.entity}/{run.project}"))
        except Exception as error:
            rank_zero_warn(f"W&B does not answer ({type(error).__name__}); what the run has read and made is not told")
            return
    for thing in (*read, *made):
        artifact = wandb.Artifact(thing.name, thing.kind, description=thing.note)
        with artifact.new_file("origin.json") as file:
            file.write(json.dumps(dict(thing.content), sort_keys=True))
        # What `use_artifact` does, too; but that waits for the server, and refuses to work offline.
        run._log_artifact(artifact, aliases=list(thing.aliases), is_user_created=True, use_after_commit=thing in read)


def _be_patient() -> None:
    for name, seconds in PATIENCE.items():
        os.environ.setdefault(name, seconds)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no more is said"])[0][:LONGEST]


def _end_wandb() -> None:
    """Let W&B come to its end before its own hook does, which prints a traceback if its service has died."""
    with suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


def _boards(loggers: Iterable[Logger]) -> list[Lasting]:
    """The loggers that speak to W&B, each of them guarded."""
    guarded = (logger if isinstance(logger, Lasting) else Lasting(logger) for logger in loggers)
    return [logger for logger in guarded if isinstance(logger.tracker, WandbLogger)]
