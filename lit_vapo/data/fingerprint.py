"""What tells the data of a run from others, in few bytes."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

# Where a row stands may change without the row.
PLACES = ("place",)


def rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """A digest of tokenised rows: all that training reads of them."""
    digest = hashlib.sha256()
    for row in rows:
        for name, value in sorted(row.items()):
            if name.endswith("_ids"):
                digest.update(name.encode() + array("q", value).tobytes())
            elif name not in PLACES:
                digest.update(json.dumps([name, value], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of a tokenizer: its vocabulary and rules, and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return hashlib.sha256(f"{rules}\n{tokenizer.chat_template}".encode()).hexdigest()
