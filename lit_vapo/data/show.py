"""What a file of preferences or prompts becomes: some rows token by token, and what there is to know of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

from rich.cells import cell_len
from rich.text import Text

from lit_vapo.console import visible
from lit_vapo.data.conversation import Preference
from lit_vapo.data.encoder import EncodedPair, Encoder
from lit_vapo.data.formats import read_preference, read_prompt
from lit_vapo.data.row import Row, UnusableError, attempt
from lit_vapo.data.tokenise import fit
from lit_vapo.types import Prompt

CONTROL, CUT, HEAD, FAINT = "bold magenta", "strike red", "bold", "dim"


class Marks(NamedTuple):
    """Signs that tell tokens apart without colour.

    Attributes:
        space: A space.
        control: What stands around a control token.
        cut: What stands around a token that is cut off.
    """

    space: str = "·"
    control: tuple[str, str] = ("«", "»")
    cut: tuple[str, str] = ("(", ")")

    @classmethod
    def of(cls, encoding: str) -> Marks:
        """Those that a terminal of this encoding can show."""
        try:
            "·«»".encode(encoding)
        except UnicodeEncodeError:
            return cls("_", ("<|", "|>"))
        return cls()


class Viewer:
    """Shows rows token by token.

    Args:
        encoder: Makes tokens of rows.
        max_length: Most tokens of prompt and response.
        marks: Signs to use.
        width: Columns of the terminal.
    """

    def __init__(self, encoder: Encoder, max_length: int, marks: Marks, width: int = 100) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.marks = marks
        self.width = width
        tokenizer = encoder.tokenizer
        self._control = {*tokenizer.all_special_ids, *encoder.stops}

    def pair(self, preference: Preference, pair: EncodedPair, place: str) -> Iterator[Text]:
        """A preference: what both responses answer, and each of them."""
        bos = self.encoder.tokenizer.bos_token_id
        prompt, sides, _ = fit(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids), self.max_length, bos)
        margin, probability, weight, subset = preference.labels
        labels = [f"margin {margin:g}"] * bool(margin) + [f"probability {probability:g}"] * (probability != 1)
        labels += [f"weight {weight:g}"] * (weight != 1) + [f"subset {subset}"] * (subset is not None)
        yield Text(", ".join([place, *labels]), style=HEAD)
        yield from self._part("prompt", pair.prompt_ids, _lost(pair.prompt_ids, prompt))
        for name, whole, kept in zip(("chosen", "rejected"), (pair.chosen_ids, pair.rejected_ids), sides, strict=True):
            yield from self._part(name, whole, range(len(kept), len(whole)), self._end(whole, kept))

    def prompt(self, ids: Sequence[int], place: str) -> Iterator[Text]:
        """A prompt to respond to."""
        yield Text(place, style=HEAD)
        yield from self._part("prompt", ids, range(0))

    def _end(self, whole: Sequence[int], kept: Sequence[int]) -> str:
        if len(kept) < len(whole):
            return "its end is cut off"
        ended = bool(whole) and whole[-1] in self.encoder.stops
        return f"ends with {self._token(whole[-1])[0]}" if ended else "has no end"

    def _part(self, name: str, ids: Sequence[int], cut: range, end: str | None = None) -> Iterator[Text]:
        said = [f"{len(ids)} tokens"] + [f"{len(cut)} of them cut off"] * bool(cut) + [end] * bool(end)
        yield Text("  ").append(name, style=HEAD).append(": " + ", ".join(map(str, said)))
        line, below = Text("   "), Text("   ")
        for index, token in enumerate(ids):
            text, style = self._token(token)
            if index in cut:
                text, style = text.join(self.marks.cut), CUT
            size = max(cell_len(text), len(str(token)))
            if cell_len(line.plain) + size + 1 > self.width and line.plain.strip():
                yield from (line, below)
                line, below = Text("   "), Text("   ")
            line.append(" ").append(text, style=style).append(" " * (size - cell_len(text)))
            below.append(f" {token:<{size}}", style=FAINT)
        yield from (line, below) if ids else ()

    def _token(self, token: int) -> tuple[str, str]:
        tokenizer = self.encoder.tokenizer
        piece = str(tokenizer.convert_ids_to_tokens(token))
        if token in self._control:
            return visible(piece).join(self.marks.control), CONTROL
        text = str(tokenizer.decode([token]))
        if piece.startswith("▁") and not text.startswith(" "):
            text = " " + text  # SentencePiece drops the space of a text's first word
        if "\ufffd" in text:
            text = piece  # a part of a character
        return visible(text).replace(" ", self.marks.space), ""


def _lost(whole: Sequence[int], kept: Sequence[int]) -> range:
    """Where a prompt lost tokens: at its beginning, or after a beginning-of-sequence token that stays."""
    lost = len(whole) - len(kept)
    start = 1 if lost and len(kept) > 1 and whole[0] == kept[0] and list(whole[lost:]) != list(kept) else 0
    return range(start, start + lost)


class Summary:
    """What there is to know of the rows of a file.

    Args:
        encoder: Makes tokens of rows.
        max_length: Most tokens of prompt and response.
        max_prompt_length: Most tokens of a prompt to respond to.
        implicit: As in `read_preference`.
    """

    def __init__(self, encoder: Encoder, max_length: int, max_prompt_length: int, implicit: bool = False) -> None:
        self.encoder = encoder
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.implicit = implicit
        self.rows = 0
        self.problems: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.lengths: dict[str, list[int]] = {}
        self.counts: Counter[str] = Counter()

    def read(self, row: Row) -> tuple[Preference, EncodedPair] | list[int] | None:
        """Take a row in.

        Returns:
            A preference and its tokens, or the tokens of a prompt; `None` if something is wrong with the row.
        """
        self.rows += 1
        try:
            return attempt(self._read, row)
        except ValueError as error:
            # What rows with one fault have in common is what was expected of them.
            expected, _, got = str(error).removeprefix(f"{row.place}: ").partition(", got ")
            kind = error.kind if isinstance(error, UnusableError) else expected
            self.problems[kind] += 1
            self.first.setdefault(kind, f"{row.place}, got {got}" if got and kind == expected else row.place)
            return None

    def _read(self, row: Row) -> tuple[Preference, EncodedPair] | list[int]:
        if not {"chosen", "rejected", "output_1"} & row.values.keys():
            return self._asked(read_prompt(row, self.implicit), row.place)
        preference = read_preference(row, self.implicit)
        pair = self.encoder.pair(preference, row.place)
        alone = self._asked(preference.prompt, row.place)
        self.counts["boundary"] += alone != pair.prompt_ids
        sides = {"chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
        cut = fit(pair.prompt_ids, tuple(sides.values()), self.max_length, self.encoder.tokenizer.bos_token_id)[2]
        self.counts["prompts"] += cut.prompts
        self.counts["responses"] += cut.responses
        for name, ids in sides.items():
            self.lengths.setdefault(name, []).append(len(ids))
            self.counts["endless"] += not ids or ids[-1] not in self.encoder.stops
        both = len(pair.prompt_ids) + max(map(len, sides.values()))
        self.lengths.setdefault("prompt and longer response", []).append(both)
        return preference, pair

    def _asked(self, prompt: Prompt, place: str) -> list[int]:
        ids = self.encoder.prompt(prompt, place).ids
        self.lengths.setdefault("prompt", []).append(len(ids))
        self.counts["long"] += len(ids) > self.max_prompt_length
        return ids

    def lines(self) -> Iterator[Text]:
        """The summary."""
        wrong = self.problems.total()
        yield Text(f"{self.rows} rows, {wrong} of them with problems", style=HEAD)
        for kind, count in self.problems.most_common():
            yield Text(f"  {count} × {kind}; the first: {self.first[kind]}")
        if self.lengths:
            yield Text("tokens", style=HEAD).append(f"{'median':>31} {'95%':>6} {'most':>6}", style=FAINT)
        for name, sizes in self.lengths.items():
            high = sorted(sizes)[min(len(sizes) - 1, int(0.95 * len(sizes)))]
            yield Text(f"  {name:<27} {median(sizes):>6g} {high:>6} {max(sizes):>6}")
        pairs = len(self.lengths.get("chosen", ()))
        if self.lengths:
            yield Text(f"  prompts longer than max_prompt_length = {self.max_prompt_length}: {self.counts['long']}")
        if pairs:
            cuts = f"{self.counts['prompts']} prompts, {self.counts['responses']} responses"
            yield Text(f"  cut at max_length = {self.max_length}: {cuts}")
            yield Text(f"  prompt and response share a token at the boundary: {self.counts['boundary']} of {pairs}")
            yield Text(f"  responses without an end: {self.counts['endless']} of {2 * pairs}")


def show(rows: Iterable[Row], summary: Summary, viewer: Viewer, count: int) -> Iterator[Text]:
    """The first `count` sound rows token by token, and a summary of all.

    Args:
        rows: The rows.
        summary: Reads them.
        viewer: Shows them.
        count: How many are shown.
    """
    for row in rows:
        found = summary.read(row)
        if found is not None and count > 0:
            count -= 1
            if isinstance(found, tuple):
                preference, pair = found
                yield from viewer.pair(preference, pair, row.place)
            else:
                yield from viewer.prompt(found, row.place)
            yield Text()
    yield from summary.lines()
