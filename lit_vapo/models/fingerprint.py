"""What tells the models that a run reads from others, in few bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from lit_vapo.integrity import fingerprint

# What a model, an adapter, an ensemble or a tokenizer is read from.
RUN = ("running.json", "finished.json")
READ = (".safetensors", ".json", ".jinja", ".model", ".txt", ".bin", ".py")


def model_fingerprints(settings: Any, key: str) -> dict[str, str]:
    """What tells the models, ensembles and adapters that settings name from others, by key.

    Of a folder it is a digest of its files; of a model of the hub it is its commit, once it has been loaded.

    Args:
        settings: Numbers, texts, lists and dicts.
        key: What their keys begin with.
    """
    found = {}
    for name, value, beside in _texts(settings, key, {}):
        folder = Path(value)
        if len(value) < 4096 and folder.is_dir():
            files = [path for path in folder.rglob("*") if path.suffix in READ and path.is_file()]
            files = [path for path in files if not _in_run(path, folder)]
            if files:
                found[name] = fingerprint(files)
        elif name.endswith(".path") and value.count("/") <= 1:
            commit = _commit(value, beside.get("revision"))
            if commit is not None:
                found[name] = f"commit {commit}"
    return found


def named_folders(settings: Any, key: str) -> dict[str, Path]:
    """The folders that settings name, by key as in `model_fingerprints`."""
    found = {name: Path(value) for name, value, _ in _texts(settings, key, {}) if len(value) < 4096}
    return {name: folder for name, folder in found.items() if folder.is_dir()}


def _in_run(path: Path, folder: Path) -> bool:
    """Whether a run that lives inside of a model's folder wrote the file."""
    inside = [folder / part for part in path.relative_to(folder).parents]
    return any((place / mark).exists() for place in inside if place != folder for mark in RUN)


def _texts(value: Any, key: str, beside: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if isinstance(value, str):
        yield key, value, beside
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}", value)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{i}]", beside)


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a hub model that is in the cache."""
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:
        # Not the name of a model at all.
        return None
    return Path(found).parent.name if isinstance(found, str) else None
