"""Looking at a model's folder before anything of it is loaded, and saying in our own words why loading failed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from transformers.utils import find_adapter_config_file, logging
from transformers.utils.hub import is_offline_mode

from lit_vapo.folders import if_moved
from lit_vapo.integrity import fault_of
from lit_vapo.models.digests import check_sealed

INDEX = "model.safetensors.index.json"
ADVICE = (
    "expected a whole model, got an adapter: merge it into its base (`lit-vapo export --merge=true`, or "
    "`merge_and_unload` of peft) and name that, or name the base here and the adapter as model.policy"
)


def check_model(path: str, key: str, revision: str | None = None) -> None:
    """Refuse what is no whole model, as far as its files tell.

    Args:
        path: A folder or a hub name; a hub name is looked at only as far as its adapter goes.
        key: The option that names it, for the message.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: There is no such folder, or a file of it is missing, damaged, of another kind or not as it was when
            it was written.
    """
    folder = Path(path)
    if not folder.is_dir():
        if _looks_local(path) or folder.exists():
            got = fault_of(folder) if folder.exists() else f"it does not exist{if_moved(path)}"
            raise ValueError(f"{key}: {_expected(path)} ({got})")
        with loading(path, key):
            adapter = find_adapter_config_file(path, revision=revision or "main")
        if adapter is not None:
            raise ValueError(f"{key}: {ADVICE} ({path!r})")
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{key}: {ADVICE} ({path!r})")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{key}: {_expected(path)} (it has no config.json)")
    _read_json(folder / "config.json", key)
    for file in _weights(folder, key):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:
            raise ValueError(f"{key}: {file} cannot be read; {fault_of(file)}") from error
    # A policy that was merged here, say; what other programs write has no digests.
    check_sealed(folder, required=False)


def _weights(folder: Path, key: str) -> list[Path]:
    """The files of weights that a folder has or speaks of."""
    index = folder / INDEX
    if index.is_file():
        names = _read_json(index, key).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(
                f"{key}: expected a weight_map from weights to files in {index}, got {type(names).__name__}"
            )
        return [folder / name for name in sorted(set(names.values()))]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        held = sorted(x.name for x in folder.iterdir())[:5]
        raise ValueError(f"{key}: expected weights in *.safetensors in {str(folder)!r}, got {held}")
    return found


def _read_json(path: Path, key: str) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: {path} cannot be read; {fault_of(path)}, and no JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{key}: expected a JSON object in {path}, got {type(content).__name__}")
    return content


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _expected(path: str) -> str:
    return f"expected a folder with a transformers model (config.json), or a hub name, got {path!r}"


def quiet() -> None:
    """No reports of unused heads and no progress bars from transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def hushed() -> Iterator[None]:
    """A block, or a function, in which transformers is `quiet`; after it, as before."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    quiet()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def loading(path: str, key: str) -> Iterator[None]:
    """A block in which a library reads a model; its errors come out as one that names option, place and reason.

    Raises:
        ValueError: The library could not read it.
    """
    try:
        with hushed():
            yield
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, ImportError):
            reason = f"a package is missing ({first})"
        elif "trust_remote_code" in str(error):
            option = f"{key.removesuffix('path')}trust_remote_code" if key.endswith(".path") else "trust_remote_code"
            reason = f"it brings Python code of its own, which runs only with {option}=true; look at it first"
        elif Path(path).is_dir():
            reason = f"the folder is there and cannot be read as one: {type(error).__name__}: {first}"
        elif isinstance(error, OSError):
            asked = "nothing was asked of the hub, which is switched off (HF_HUB_OFFLINE)"
            reason = asked if is_offline_mode() else f"the hub has no such model for you, or was not reached ({first})"
            reason = f"there is no such folder in {Path.cwd()}, none in the cache, and {reason}"
        else:
            reason = f"{type(error).__name__}: {first}"
        raise ValueError(f"{key}: {_expected(path)}; {reason}") from error
