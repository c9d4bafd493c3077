"""Files of rows: each row that is read means what it was written to mean, token for token, and no other is read."""

import re
from typing import Any, NamedTuple

from hypothesis import strategies as st

from lit_vapo.data.datamodule import PreferenceDataModule
from tests.generated import world
from tests.generated.outcome import Kind, WrongError
from tests.generated.pairs import BAD, DIALOGUES, MESSAGES, SHAPES, USELESS, Meaning, Written, written
from tests.generated.texts import count_special, ids_to_bytes

CONTROL = re.compile("<(?:eos|bos|pad)>")


class File(NamedTuple):
    """Rows, how they stand in a file, and the options they are read with."""

    rows: list[Written]
    form: str
    options: dict[str, Any]


NAMES = {"chosen": "better", "rejected": "chosen"}


@st.composite
def files(draw, shape, names=NAMES):
    """A file of rows of one shape, perhaps with other names for its columns."""
    form = draw(st.sampled_from(("lines", "lines", "array", "stream")))
    names = draw(st.sampled_from((None, None, names)))
    rows = draw(st.lists(written(shape, lines=form != "array", names=names), min_size=1, max_size=3))
    return File(rows, form, {"skip_invalid": draw(st.booleans()), "columns": names})


def write(file: File, folder):
    """The file, and the place of each row."""
    if file.form == "array":
        path = folder / "rows.json"
        path.write_bytes(b"[\n" + b",\n".join(row.line for row in file.rows) + b"\n]")
        return path, [f"{path}, line {index + 2}" for index in range(len(file.rows))]
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(row.line + b"\n" for row in file.rows))
    return path, [f"{path}, line {index + 1}" for index in range(len(file.rows))]


def check_file(file: File, folder) -> None:
    """Read the file and compare."""
    path, places = write(file, folder)
    meant = {place: row.meaning for place, row in zip(places, file.rows, strict=True)}
    check_rows(path, meant, file.options, file.form == "stream")


def check_rows(path, meant: dict[str, Meaning | str] | None, options, streams=False) -> None:
    """Read a file of preferences whose rows, by place, mean this; `None`: nobody knows, not even whether it is one."""
    meanings = list((meant or {}).values())
    right = [place for place, meaning in (meant or {}).items() if meaning not in (BAD, USELESS)]
    # What is of no use is left out, as long as most rows are of some.
    sound = bool(right) and (
        options["skip_invalid"] or (BAD not in meanings and 2 * meanings.count(USELESS) <= len(meanings))
    )
    try:
        data = PreferenceDataModule(
            world.text_tokenizer(),
            str(path),
            validation_fraction=0,
            max_length=1_000_000,
            streaming=streams,
            batch_size=2,
            **options,
        )
        rows = [row for row, _ in data.stream(shuffle=False).pairs()] if streams else data.preference_rows("train")
    except ValueError as error:
        if sound:
            raise WrongError(f"refused though all is well: {error}") from error
        raise
    if meant is None:
        return
    if not sound:
        raise WrongError(f"read though it is to be refused: {meanings}")
    if [row["place"] for row in rows] != right:
        raise WrongError(f"read the rows at {[row['place'] for row in rows]} in place of those at {right}")
    for row in rows:
        check_pair(row, meant[row["place"]])


def check_pair(row, meaning: Meaning) -> None:
    """Compare the tokens and labels of a pair with what its row means."""
    prompt = opening(meaning).text.encode()
    size = row["prompt_length"]
    crosses = False
    for side in ("chosen", "rejected"):
        ids = row[f"{side}_ids"]
        check_tokens(side, whole(meaning, getattr(meaning, side)), ids)
        crosses |= len(ids_to_bytes(world.tokenizer(), ids[: size + 1])) > len(prompt)
    kept = ids_to_bytes(world.tokenizer(), row["chosen_ids"][:size])
    if row["chosen_ids"][:size] != row["rejected_ids"][:size] or not prompt.startswith(kept):
        raise WrongError(f"expected the prompt {prompt!r}, got {kept!r}")
    # Shorter than the prompt it is only where a token of one of the two lies across its end.
    if not crosses:
        raise WrongError(f"expected the prompt {prompt!r} as a whole, got {kept!r}")
    for name, value in meaning.labels.items():
        if row[name] != value:
            raise WrongError(f"expected {name} {value}, got {row[name]}")


class Text(NamedTuple):
    """A text, and how many control tokens it has."""

    text: str
    control: int


def opening(meaning: Meaning) -> Text:
    """What the policy reads of a prompt."""
    if isinstance(meaning.prompt, str):
        return Text(meaning.prompt, 0)
    return rendered(meaning.prompt, meaning.tools, add_generation_prompt=True)


def whole(meaning: Meaning, response) -> Text:
    """Prompt and response, which ends with an end token."""
    if isinstance(meaning.prompt, str):
        return Text(f"{meaning.prompt}{response}<eos>", 1)
    return rendered([*meaning.prompt, *response], meaning.tools)


def rendered(messages, tools, **options) -> Text:
    """What the template writes; what users write is no control token."""
    text, plain = (
        str(world.tokenizer().apply_chat_template(clean(messages), tools=clean(tools), tokenize=False, **options))
        for clean in (lambda value: value, harmless)
    )
    return Text(text, len(CONTROL.findall(plain)))


def check_tokens(name: str, expected: Text, ids) -> None:
    """Compare token ids with a text."""
    said, control = ids_to_bytes(world.tokenizer(), ids), count_special(world.tokenizer(), ids)
    if said != expected.text.encode() or control != expected.control:
        raise WrongError(f"{name}: expected the tokens of {expected}, got {ids}, {control} control tokens: {said!r}")


def harmless(value):
    """The same without what could be a control token."""
    if isinstance(value, str):
        return value.replace("<", "(")
    if isinstance(value, dict):
        return {key: harmless(x) for key, x in value.items()}
    return [harmless(x) for x in value] if isinstance(value, list) else value


KINDS = [
    Kind("rows of texts", files(SHAPES["texts"], {**NAMES, "prompt": "question"}), check_file, 9),
    Kind("HH dialogues", st.sampled_from(DIALOGUES).flatmap(files), check_file, 9),
    Kind("rows of messages", st.sampled_from(MESSAGES).flatmap(files), check_file, 12),
]
