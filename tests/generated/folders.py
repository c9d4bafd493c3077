"""Folders of ensembles and policies with one file changed."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lit_vapo.models.digests import DIGESTS_NAME, seal
from tests.generated.harm import BYTES, SHARE, VALUES, change_bytes, change_value


class Change(NamedTuple):
    """What is done to a folder.

    Attributes:
        file: Which file, as a share of those there are.
        way: `bytes`; `value`, one of those in the file; `missing`; or `folder`, one in the file's place.
        how: What is done to the bytes or to the value.
        signed: Whether the digests are made to fit again, as by somebody who knows of them.
    """

    file: float
    way: str
    how: tuple
    signed: bool


CHANGES = st.one_of(
    st.builds(Change, SHARE, st.just("bytes"), BYTES, st.just(False)),
    st.builds(Change, SHARE, st.just("value"), VALUES, st.booleans()),
    st.builds(Change, SHARE, st.sampled_from(("missing", "folder")), st.just(()), st.booleans()),
)


def changed(source: str, target: Path, change: Change) -> Path:
    """A copy of a folder with the change made; returns the file it was made in, within the folder."""
    shutil.copytree(source, target)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    path = files[int(change.file * len(files))]
    if change.way == "bytes":
        path.write_bytes(change_bytes(path.read_bytes(), *change.how))
    elif change.way == "value" and path.suffix == ".json":
        content = change_value(json.loads(path.read_text()), *change.how)
        path.write_text(json.dumps(None if content is ... else content))
    elif change.way == "value" and path.suffix == ".safetensors":
        content = change_value(load_file(path), change.how[0][:1], change.how[1])
        save_file({name: x for name, x in content.items() if hasattr(x, "dtype")}, path)
    else:
        path.unlink()
        if change.way == "folder":
            path.mkdir()
    if change.signed:
        sign(target)
    return path.relative_to(target)


def sign(folder: Path) -> None:
    """Make the digests fit what is there now."""
    if not (folder / DIGESTS_NAME).is_dir():
        seal(folder)
