"""Changes of files and of values in them: by accident, by hand, or meant to do harm."""

import torch
from hypothesis import strategies as st

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000000\n"
# A place, as a share of the places there are.
SHARE = st.integers(0, 999_999).map(lambda parts: parts / 1_000_000)
# How, and where as a share of the file.
BYTES = st.tuples(
    st.sampled_from(("flip", "flip", "flip", "flip", "cut", "zeros", "more", "twice", "empty", "text", "pointer")),
    SHARE,
    st.integers(0, 7),
)


def change_bytes(content: bytes, how: str, where: float, bit: int) -> bytes:
    """A file's bytes, changed."""
    at = int(where * len(content))
    return {
        "flip": lambda: content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :],
        "cut": lambda: content[:at],
        "zeros": lambda: content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :],
        "more": lambda: content + bytes(range(256)),
        "twice": lambda: content + content,
        "empty": lambda: b"",
        "text": lambda: b"not what you think\n",
        "pointer": lambda: POINTER,
    }[how]()


# A path to a value, each step a share of what there is to choose from; and what to put there, `...` to take it out.
VALUES = st.tuples(
    st.lists(SHARE, min_size=1, max_size=6),
    st.sampled_from(
        (
            *(..., ..., None, True, -1, 0, 2, 10**20, 0.5, float("nan"), float("inf"), "", "x", "../../x", [], [None]),
            *({}, {"a": 1}, {"class_path": "os.system", "init_args": {"command": "touch x"}}, "nan", 1e308, -1e308),
        )
    ),
)


def change_value(content, path, value):
    """A copy of nested dicts and lists in which the value at a path is another one, or missing.

    A tensor is filled with what is not finite, cut, or replaced.
    """
    if isinstance(content, torch.Tensor):
        return changed_tensor(content, value)
    if not path or not isinstance(content, (dict, list)) or not content:
        return value
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[int(path[0] * len(keys))]
    inner = change_value(content[key], path[1:], value)
    if isinstance(content, list):
        return [*content[:key], *([] if inner is ... else [inner]), *content[key + 1 :]]
    return {k: inner if k == key else x for k, x in content.items() if k != key or inner is not ...}


def changed_tensor(tensor, value):
    """A tensor that is not the one it was, by its size, kind or numbers."""
    if value is ... or isinstance(value, (str, dict)) or value is None:
        return value
    if isinstance(value, float) and tensor.is_floating_point():
        return torch.full_like(tensor, value if value != value else float("inf"))
    return torch.cat([tensor.flatten(), tensor.flatten()[:1]])
