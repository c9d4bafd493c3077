"""What the splits hold: rows of preferences and prompts, read and tokenised when first asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch

from lit_vapo.data.collate import Collator, PromptBatch
from lit_vapo.data.columns import Columns
from lit_vapo.data.encoder import Encoder
from lit_vapo.data.fingerprint import rows_fingerprint, tokenizer_fingerprint
from lit_vapo.data.mixing import Sources
from lit_vapo.data.readers import PairReader, PromptReader, first_prompts, read_all
from lit_vapo.data.sources import local_files
from lit_vapo.data.splits import Pairs, Rows, load_splits
from lit_vapo.data.stream import PairStream
from lit_vapo.integrity import fingerprint
from lit_vapo.types import TokenSequence


class TextSplits:
    """Rows by split; `TextDataModule` adds the options, which set these attributes, and the loaders."""

    preference_sources: dict[str, Sources | None]
    prompt_sources: dict[str, Sources | None]
    own_prompts: bool
    validation_fraction: float
    test_fraction: float
    streaming: bool
    stream_buffer: int
    max_length: int
    skip_invalid: bool
    columns: Columns
    sample: int | None
    batch_size: int
    seed: int | None
    collator: Collator
    encoder: Encoder
    _pair_reader: PairReader
    _prompt_reader: PromptReader
    _rows: dict[str, dict[str, Rows]]
    # Where messages go; with several processes, of the first one only.
    inform: Callable[[str], object] = staticmethod(logging.getLogger(__name__).info)
    warn: Callable[[str], object] = staticmethod(warnings.warn)

    @property
    def streams(self) -> bool:
        """Whether the rows to train on come as a stream, so that no split `train` of them is held."""
        return self.streaming

    @property
    def order_seed(self) -> int:
        """Seed of all orders: that of the data if there is one, or else the one the process was seeded with."""
        return torch.initial_seed() if self.seed is None else self.seed

    def keep_texts(self) -> None:
        """Keep what each pair says beside its tokens (`preference` of a row); called before any row is read."""
        self._pair_reader = self._pair_reader._replace(keep=True)

    def preference_rows(self, split: str) -> Rows:
        """Tokenised preferences of `train`, `val`, `test` or `ood`; none of the last if it is not given.

        Raises:
            ValueError: The split is not held, but streams.
        """
        if self.streams and split == "train":
            raise ValueError("data.streaming: expected a split that is held (val, test, ood), got train, which streams")
        return self._split("preferences", self.preference_sources, self._load_preferences)[split]

    def prompt_rows(self, split: str) -> Rows:
        """Tokenised prompts of `train`, `val` or `test`.

        Raises:
            ValueError: They are those of preferences that stream.
        """
        if self._prompts_stream and split == "train":
            raise ValueError("data.prompts: expected files or hub names beside preferences that stream, got null")
        return self._split("prompts", self.prompt_sources, self._load_prompts)[split]

    def preferences(self, split: str) -> Pairs:
        """Both sides of all pairs of a split that is held, in a stable order."""
        rows = self.preference_rows(split)
        return Pairs(
            [TokenSequence(r["chosen_ids"], r["prompt_length"]) for r in rows],
            [TokenSequence(r["rejected_ids"], r["prompt_length"]) for r in rows],
        )

    def longest_pair(self) -> int:
        """Tokens of the longest prompt with its response, in any split; of a stream, as many as it may have."""
        if self.streams:
            return self.max_length
        rows = [r for split in ("train", "val", "test", "ood") for r in self.preference_rows(split)]
        return max(max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows)

    def largest_token(self) -> tuple[int, str]:
        """The largest token id of all rows that are held, and where it stands; of a stream, that of the vocabulary."""
        found = [(-1, "no row")]
        if self.streams:
            padding = {self.encoder.tokenizer.pad_token_id}
            found = [
                (max({*self.encoder.tokenizer.get_vocab().values()} - padding), "the vocabulary, for data streams")
            ]
        for row in chain.from_iterable(rows for splits in self._rows.values() for rows in splits.values()):
            sequences = (row.get(name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
            found.append((max(chain.from_iterable(ids or () for ids in sequences), default=-1), row["place"]))
        return max(found, key=lambda token: token[0])

    def fingerprints(self) -> dict[str, str]:
        """What tells the tokenizer and the rows that have been read from others, by key."""
        found = {"data.tokenizer": tokenizer_fingerprint(self.encoder.tokenizer)}
        for name, splits in self._rows.items():
            found |= {f"data.{name} ({split})": rows_fingerprint(rows) for split, rows in splits.items() if rows}
        sources = self.preference_sources["train"]
        if self.streaming and sources is not None:
            files = local_files(sources)
            found |= {"data.preferences": fingerprint(files)} if files else {}
        return found

    def place(self, example_id: int) -> str:
        """Where a pair stands (`file, line 7`), for messages that have to name it."""
        held = [split for split in ("train", "val", "test", "ood") if not (self.streams and split == "train")]
        rows: Iterable[dict[str, Any]] = (row for split in held for row in self.preference_rows(split))
        if self.streams:
            rows = chain(rows, (row for row, _ in self.stream().pairs()))
        return next((row["place"] for row in rows if row["example_id"] == example_id), f"pair {example_id}")

    def prompt_batches(self, split: str, count: int) -> list[PromptBatch]:
        """The first `count` prompts of a split (or all, if there are fewer) in batches."""
        if self._prompts_stream and split == "train":
            rows = first_prompts(self.stream().rows(), self._prompt_reader, count, "data.prompts", self.skip_invalid)
        else:
            rows = self.prompt_rows(split)[:count]
        return [self.collator.prompts(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]

    def stream(self, num_replicas: int = 1, rank: int = 0, shuffle: bool = True) -> PairStream:
        """The training preferences as a stream, or a process's part of it.

        Raises:
            ValueError: None are given.
        """
        sources = self.preference_sources["train"]
        if sources is None:
            raise ValueError("data.preferences: expected files or hub names, got null")
        return PairStream(
            sources,
            "data.preferences",
            self._pair_reader,
            self.skip_invalid,
            self.batch_size,
            self.stream_buffer,
            self.order_seed,
            num_replicas,
            rank,
            shuffle,
            self.columns,
        )

    @property
    def _prompts_stream(self) -> bool:
        return self.streaming and not self.own_prompts

    def _split(
        self, name: str, sources: Mapping[str, Sources | None], load: Callable[[Sources, str], Rows]
    ) -> dict[str, Rows]:
        if name not in self._rows:
            streams = self._prompts_stream if name == "prompts" else self.streams
            found = load_splits(f"data.{name}", sources, load, self.validation_fraction, self.test_fraction, streams)
            self._rows[name] = found
            counts = {split: len(rows) for split, rows in found.items() if rows or split != "ood"}
            numbers = {**counts, "train": "a stream to"} if streams else counts
            self.inform(f"data.{name}: " + ", ".join(f"{number} {split}" for split, number in numbers.items()))
        return self._rows[name]

    def _load_preferences(self, sources: Sources, key: str) -> Rows:
        found = read_all(sources, key, self._pair_reader.read, self.skip_invalid, self.columns, self.sample)
        cut = self._pair_reader.truncation((cut for _, cut in found), key)
        if cut is not None:
            self.warn(cut)
        return [tokens for tokens, _ in found]

    def _load_prompts(self, sources: Sources, key: str) -> Rows:
        rows = read_all(sources, key, self._prompt_reader.read, self.skip_invalid, self.columns, self.sample)
        if self.own_prompts:
            # A file of prompts is taken as it is.
            return rows
        # Several pairs may answer one prompt: it has the further columns of the first.
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            found.setdefault(row["identity"], row)
        return list(found.values())
