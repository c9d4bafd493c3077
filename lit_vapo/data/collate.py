"""Batches: what the modules receive. Masks come from the lengths, never from the token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_vapo.types import PairLabels, Prompt


class PreferenceBatch(NamedTuple):
    """Pairs of responses, right-padded.

    Attributes:
        chosen_ids: Prompt and preferred response (B, Lc).
        chosen_lengths: Tokens of each (B,).
        rejected_ids: Prompt and other response (B, Lr).
        rejected_lengths: Tokens of each (B,).
        prompt_lengths: Tokens of each prompt (B,).
        labels: What else is known of each pair.
    """

    chosen_ids: Tensor
    chosen_lengths: Tensor
    rejected_ids: Tensor
    rejected_lengths: Tensor
    prompt_lengths: Tensor
    labels: PairLabels


class PromptBatch(NamedTuple):
    """Prompts to respond to, left-padded.

    Attributes:
        input_ids: Token ids (B, P), left-padded.
        lengths: Tokens of each prompt (B,).
        prompts: Text of each prompt.
        example_ids: Stable identity of each prompt (B,), int64.
        asked: What each prompt says, for models that write it down in another way.
        columns: Further columns of the prompts' file by name, B values each.
    """

    input_ids: Tensor
    lengths: Tensor
    prompts: list[str]
    example_ids: Tensor
    asked: list[Prompt] | None = None
    columns: dict[str, list[Any]] | None = None

    def to(self, device: torch.device) -> PromptBatch:
        """The batch on a device."""
        ids, lengths, example_ids = (x.to(device) for x in (self.input_ids, self.lengths, self.example_ids))
        return self._replace(input_ids=ids, lengths=lengths, example_ids=example_ids)


class SFTBatch(NamedTuple):
    """Prompts with the responses to imitate, right-padded.

    Attributes:
        input_ids: Token ids (B, L).
        lengths: Tokens of prompt and response (B,).
        prompt_lengths: Tokens of each prompt (B,); the loss starts after them.
        example_ids: Stable identity of each pair that a response was taken from (B,), int64.
        counts: False where a row only stands in to give every process as many (B,), bool.
    """

    input_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    example_ids: Tensor
    counts: Tensor


def pad(sequences: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """Padded ids (B, L) and lengths (B,); token 0 pads, which every model has, and nothing looks at it."""
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.long)
    size = int(lengths.max())
    ids = torch.zeros((len(sequences), size), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        where = slice(size - len(sequence), size) if left else slice(0, len(sequence))
        ids[row, where] = torch.tensor(sequence, dtype=torch.long)
    return ids, lengths


def pair_labels(rows: Sequence[dict[str, Any]]) -> PairLabels:
    """The labels of tokenised pairs."""
    return PairLabels(
        torch.tensor([r["margin"] for r in rows], dtype=torch.float32),
        torch.tensor([r["probability"] for r in rows], dtype=torch.float32),
        torch.tensor([r["weight"] for r in rows], dtype=torch.float32),
        *_dealt(rows),
    )


def _dealt(rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Which rows these are, and which of them count."""
    return torch.tensor([r["example_id"] for r in rows]), torch.tensor([r.get("counts", True) for r in rows])


class Collator:
    """Turns tokenised rows into batches."""

    def preferences(self, rows: list[dict[str, Any]]) -> PreferenceBatch:
        """A batch of pairs."""
        chosen, chosen_lengths = pad([r["chosen_ids"] for r in rows])
        rejected, rejected_lengths = pad([r["rejected_ids"] for r in rows])
        return PreferenceBatch(
            chosen,
            chosen_lengths,
            rejected,
            rejected_lengths,
            torch.tensor([r["prompt_length"] for r in rows]),
            pair_labels(rows),
        )

    def prompts(self, rows: list[dict[str, Any]]) -> PromptBatch:
        """A batch of prompts."""
        ids, lengths = pad([r["prompt_ids"] for r in rows], left=True)
        identities = torch.tensor([r["example_id"] for r in rows])
        texts, asked = [r["prompt"] for r in rows], [r["asked"] for r in rows]
        names = dict.fromkeys(name for r in rows for name in r["columns"])
        # None where a row lacks what others have, as Parquet and TRL's data sets say it.
        columns = {name: [r["columns"].get(name) for r in rows] for name in names}
        return PromptBatch(ids, lengths, texts, identities, asked, columns)

    def sft(self, rows: list[dict[str, Any]]) -> SFTBatch:
        """A batch of demonstrations: the preferred responses."""
        ids, lengths = pad([r["chosen_ids"] for r in rows])
        return SFTBatch(ids, lengths, torch.tensor([r["prompt_length"] for r in rows]), *_dealt(rows))
