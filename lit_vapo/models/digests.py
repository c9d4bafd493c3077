"""What the files of a folder were when it was written, so that a change is noticed when it is read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field

from lit_vapo.folders import let_read
from lit_vapo.integrity import fault_of
from lit_vapo.models.settings import STRICT, read_settings

DIGESTS_NAME, CARD_NAME = "digests.json", "README.md"


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name or name == ".":
        raise ValueError(f"expected the name of a file inside of the folder, got {name!r}")
    return name


class _File(BaseModel):
    model_config = STRICT

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Digests(BaseModel):
    model_config = STRICT

    files: dict[Annotated[str, AfterValidator(_inside)], _File]


def seal(folder: str | Path) -> None:
    """Note size and SHA-256 of each file of a folder in `digests.json`, and let others read what their group may.

    The card is left out: it is there to be edited. Whoever changes a file on purpose calls this again.

    Args:
        folder: A folder with all its files.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink():
            let_read(path)
            if name not in (DIGESTS_NAME, CARD_NAME):
                files[name] = _noted(path)
    _write(folder, _Digests(files=files))


def add_sealed(folder: Path, name: str, text: str) -> None:
    """Write one more file into a folder that was written with `seal`, and note it as well."""
    (folder / name).write_text(text, encoding="utf-8")
    digests = _read(folder)
    digests.files[name] = _noted(folder / name)
    _write(folder, digests)


def check_sealed(folder: str | Path, *names: str, required: bool = True) -> None:
    """Compare files with the digests that were noted when they were written, at about 0.9 GB/s.

    Args:
        folder: A folder that was written with `seal`.
        names: Files and folders in it that are to be read; none for all there are.
        required: Refuse a folder without digests; off where other programs may have written it.

    Raises:
        ValueError: A file is missing, was changed or damaged, or has no digest.
    """
    folder = Path(folder)
    if not required and not (folder / DIGESTS_NAME).exists():
        return
    digests = _read(folder)
    for name in names:
        if not any(_below(file, name) for file in digests.files):
            raise ValueError(f"{folder}: expected {name} among the files of {DIGESTS_NAME}, got none")
    for name in _listed(digests, names):
        path, noted = folder / name, digests.files[name]
        if not path.is_file():
            raise ValueError(f"{path}: expected the file that {DIGESTS_NAME} lists, got none")
        size = path.stat().st_size
        if size != noted.size or _sha256(path) != noted.sha256:
            fault = fault_of(path)
            told = size != noted.size and ("LFS" in fault or "empty" in fault)
            raise ValueError(
                f"{path}: expected the {noted.size} bytes that were written, got {size} others: "
                f"{fault if told else 'it was changed or damaged'}. "
                f"If you changed it on purpose: lit_vapo.models.digests.seal({str(folder)!r})"
            )


def copy_sealed(source: str | Path, target: Path, *names: str) -> None:
    """Copy files that were compared with their digests, and nothing else, into another folder.

    Args:
        source: A folder that was written with `seal`.
        target: Where to.
        names: Files and folders; none for all there are.

    Raises:
        ValueError: As `check_sealed`, or a file is a link that leads out of the folder.
    """
    source = Path(source)
    home = source.resolve()
    for name in _listed(_read(source), names):
        inside = (source / name).resolve()
        if not inside.is_relative_to(home):
            raise ValueError(f"{source / name}: expected a file inside of the folder, got a link to {str(inside)!r}")
    check_sealed(source, *names)
    for name in _listed(_read(source), names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _read(folder: Path) -> _Digests:
    if not (folder / DIGESTS_NAME).is_file():
        raise ValueError(
            f"{folder}: expected {DIGESTS_NAME}, which is written with every ensemble, got none. Export it again, or, "
            f"if its files are as you want them: lit_vapo.models.digests.seal({str(folder)!r})"
        )
    return read_settings(folder / DIGESTS_NAME, _Digests)


def _write(folder: Path, digests: _Digests) -> None:
    (folder / DIGESTS_NAME).write_text(digests.model_dump_json(indent=2) + "\n")


def _noted(path: Path) -> _File:
    return _File(size=path.stat().st_size, sha256=_sha256(path))


def _listed(digests: _Digests, names: tuple[str, ...]) -> Iterator[str]:
    return (file for file in digests.files if not names or any(_below(file, name) for name in names))


def _below(file: str, name: str) -> bool:
    return file == name or file.startswith(f"{name}/")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
