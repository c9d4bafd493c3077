"""Running a study: what is missing, on one machine or many, until every repetition has its record.

A folder holds `study.json` (configuration and versions), `config.yaml` (the configuration alone),
`parts/SETTING/FIRST-LAST.json` (records of a block of repetitions, written whole or not at all) and `results.jsonl`
(all records in order). Which parts there are is all the state there is, so a run may be killed at any moment and
started again.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from joblib import Parallel, delayed
from rich.progress import track

from lit_vapo.folders import write_whole
from lit_vapo.models.older import renamed
from lit_vapo.stages.settings import plain
from lit_vapo.study.experiment import Analysis, Experiment, Record, Repetition, expect, seed_of

VERSIONS = ("lit-vapo", "torch", "numpy", "scipy", "statsmodels", "lightning", "transformers", "peft")
FAILED = ".failed.json"


@dataclass
class Study:
    """R repetitions of an experiment in every setting.

    Args:
        experiment: What is repeated.
        output: Folder of the results. It may hold results of the same experiment and seed: what is missing is added.
        repetitions: R. More may be asked of a finished study.
        seed: Seed of the study, from which every repetition has its own.
        analysis: What is compared.
    """

    experiment: Experiment
    output: str
    repetitions: int = 100
    seed: int = 0
    analysis: Analysis = field(default_factory=Analysis)

    def __post_init__(self) -> None:
        expect("repetitions", self.repetitions, self.repetitions >= 1, "at least 1")
        methods = self.experiment.methods
        for name in self.analysis.baselines if methods else ():
            expect("analysis.baselines", repr(name), name in methods, f"some of {', '.join(map(repr, methods))}")


class Part(NamedTuple):
    """A block of repetitions of one setting, from `first` to `last`."""

    setting: str
    first: int
    last: int

    def path(self, output: str | Path, suffix: str = ".json") -> Path:
        """Its file."""
        return Path(output) / "parts" / self.setting / f"{self.first:06d}-{self.last:06d}{suffix}"


class Results(NamedTuple):
    """What is known of a study.

    Attributes:
        records: Records of all finished repetitions, in order.
        failures: `setting`, `repetition`, `seed` and `error` of those that failed.
        missing: How many repetitions have neither yet, by setting.
        versions: The different sets of versions that they were made with: more than one after an upgrade half-way.
    """

    records: list[Record]
    failures: list[dict[str, Any]]
    missing: dict[str, int]
    versions: list[dict[str, str]]


def run(
    study: Study,
    config: Mapping[str, Any],
    jobs: int = 1,
    threads: int = 1,
    backend: str = "loky",
    shard: str = "0/1",
    retry_failed: bool = False,
) -> Results:
    """Run what is missing of a study, and merge what there is.

    Args:
        study: The study.
        config: The configuration it was built from; results of another are refused.
        jobs: Processes at once; -1 for one on each core.
        threads: Threads of torch in each process.
        backend: A back end of joblib, `loky` on one machine; others, such as dask, must be installed and reachable.
        shard: `i/n`: run the i-th (from 0) of n equal shares, for machines that see one folder.
        retry_failed: Run again what failed before.

    Returns:
        What is known afterwards.

    Raises:
        ValueError: The folder holds results of another configuration, or the shard is none.
    """
    index, count = _parse_shard(shard)
    claim(study, config)
    parts = [part for i, part in missing_parts(study, retry_failed) if i % count == index]
    with_workers = Parallel(n_jobs=jobs, backend=backend, return_as="generator_unordered")
    done = with_workers(delayed(_work)(study.experiment, study.output, study.seed, part, threads) for part in parts)
    for _ in track(done, description="parts", total=len(parts)):
        pass
    return merge(study)


def claim(study: Study, config: Mapping[str, Any]) -> None:
    """Write `study.json` and `config.yaml`, unless the folder belongs to another configuration.

    Raises:
        ValueError: It does; the message names the keys that differ.
    """
    path = Path(study.output) / "study.json"
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))["config"]
        # How many repetitions and what is compared may change, and by which of its names a class was chosen: none
        # changes a record.
        parts = [{k: c.get(k) for k in ("experiment", "seed")} for c in (renamed(there), config)]
        both = [dict(_flat(plain(part))) for part in parts]
        differ = [key for key in sorted({*both[0], *both[1]}) if both[0].get(key) != both[1].get(key)]
        if differ:
            lines = [f"{key}: {both[0].get(key)!r} there, {both[1].get(key)!r} here" for key in differ]
            raise ValueError(
                f"output: {study.output!r} holds results of another configuration; choose another folder, or these "
                f"values: {'; '.join(lines)}"
            )
    write_whole(path, json.dumps({"config": config, "versions": versions()}, indent=2) + "\n")
    write_whole(path.with_name("config.yaml"), yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def missing_parts(study: Study, retry_failed: bool = False) -> Iterator[tuple[int, Part]]:
    """Parts without a file, each with its place in the whole study, which does not change as others are finished.

    Args:
        study: The study.
        retry_failed: Count those that failed among them.
    """
    size = study.experiment.block_size
    blocks = range(0, study.repetitions, size)
    for place, setting in enumerate(study.experiment.settings):
        files = _files(study, setting)
        kept = [path for path in files if not (retry_failed and path.name.endswith(FAILED))]
        there = {n for path in kept for n in _span(path)}
        for block, first in enumerate(blocks):
            wanted = [n for n in range(first, min(first + size, study.repetitions)) if n not in there]
            # Runs of consecutive numbers: a study that has grown may have the beginning of a block.
            starts = [n for n in wanted if n - 1 not in wanted]
            ends = [n for n in wanted if n + 1 not in wanted]
            for part in zip(starts, ends, strict=True):
                yield place * len(blocks) + block, Part(setting, *part)


def merge(study: Study) -> Results:
    """Read all parts and write `results.jsonl`: a line for each record or failed repetition, in order."""
    records: list[Record] = []
    failures: list[dict[str, Any]] = []
    made_with: list[dict[str, str]] = []
    missing = {}
    for setting in study.experiment.settings:
        there: set[int] = set()
        for path in _files(study, setting):
            try:
                part = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:  # a failure that another shard is trying again
                continue
            there.update(n for n in _span(path) if n < study.repetitions)
            if part["versions"] not in made_with:
                made_with.append(part["versions"])
            records += [r for r in (Record(**r) for r in part["records"]) if r.repetition < study.repetitions]
            failures += [f for f in part["failures"] if f["repetition"] < study.repetitions]
        missing[setting] = study.repetitions - len(there)
    order = {setting: place for place, setting in enumerate(study.experiment.settings)}
    # Stable: the methods of a repetition stay in the experiment's order.
    records.sort(key=lambda r: (order[r.setting], r.repetition))
    failures.sort(key=lambda f: (order[f["setting"]], f["repetition"]))
    lines = [json.dumps(line, sort_keys=True) for line in [*map(vars, records), *failures]]
    write_whole(Path(study.output) / "results.jsonl", "".join(f"{line}\n" for line in lines))
    return Results(records, failures, missing, made_with)


def versions() -> dict[str, str]:
    """Versions of what a record may depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _work(experiment: Experiment, output: str, seed: int, part: Part, threads: int) -> None:
    """Run one part and write its file, whatever happens."""
    torch.set_num_threads(threads)
    numbers = range(part.first, part.last + 1)
    repetitions = [Repetition(n, seed_of(seed, part.setting, n)) for n in numbers]
    written: dict[str, Any] = {"versions": versions(), "records": [], "failures": []}
    try:
        written["records"] = [vars(record) for record in experiment.run_block(part.setting, repetitions)]
    except Exception as error:  # whatever it was, it is recorded and the others go on
        what = f"{type(error).__name__}: {error}"
        written["failures"] = [
            {"setting": part.setting, "repetition": r.number, "seed": r.seed, "error": what} for r in repetitions
        ]
        written["traceback"] = traceback.format_exc()
    suffix = FAILED if written["failures"] else ".json"
    path = part.path(output, suffix)
    # What failed before and was run again. First, so that a kill in between leaves it missing and not there twice.
    for old in path.parent.glob(f"[0-9]*{FAILED}"):
        if _span(old).start in range(part.first, part.last + 1):
            old.unlink()
    write_whole(path, json.dumps(written) + "\n")


def _files(study: Study, setting: str) -> list[Path]:
    """Files of the finished and failed parts of a setting, in order."""
    return sorted((Path(study.output) / "parts" / setting).glob("[0-9]*.json"))


def _span(path: Path) -> range:
    """Repetitions that a part's file is about."""
    first, last = path.name.partition(".")[0].split("-")
    return range(int(first), int(last) + 1)


def _parse_shard(shard: str) -> tuple[int, int]:
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"shard: expected i/n with 0 <= i < n, got {shard!r}")
    return int(index), int(count)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested configuration by dotted key."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
