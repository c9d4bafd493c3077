"""Rows of any JSON under the names of columns: what is read of them is what they say."""

import json

from hypothesis import strategies as st

from lit_vapo.data.datamodule import PreferenceDataModule
from tests.generated import world
from tests.generated.outcome import Kind, WrongError
from tests.generated.texts import NO_TEXT, TEXT, ids_to_bytes

NAMES = ("prompt", "chosen", "rejected", "margin", "weight", "agreement", "tie", "subset", "tools", "system", "images")
NAMES += ("question", "instruction", "input", "output_1", "output_2", "label", "messages", "conversations", "score")
MESSAGE = st.dictionaries(
    st.sampled_from(("role", "content", "tool_calls", "name", "text", "type")),
    st.one_of(TEXT, st.sampled_from(("user", "assistant", "system", "tool", "text")), st.none(), NO_TEXT),
    max_size=3,
)
VALUE = st.one_of(
    TEXT,
    TEXT,
    st.none(),
    NO_TEXT,
    st.lists(MESSAGE, max_size=3),
    st.recursive(NO_TEXT, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2)),
)
MOSTLY_TEXT = st.integers(0, 9).flatmap(lambda number: TEXT if number else VALUE)
OTHERS = {name: VALUE for name in NAMES if name not in ("prompt", "chosen", "rejected")}
ROWS = st.lists(
    st.builds(
        lambda texts, others: {**texts, **others},
        st.fixed_dictionaries({"chosen": MOSTLY_TEXT, "rejected": MOSTLY_TEXT}, optional={"prompt": MOSTLY_TEXT}),
        st.lists(st.sampled_from(sorted(OTHERS)), max_size=2).flatmap(
            lambda names: st.fixed_dictionaries({name: OTHERS[name] for name in names})
        ),
    ),
    min_size=1,
    max_size=2,
)


def check_anything(rows, folder) -> None:
    """Read the file; of the texts of the rows that are read, nothing is missing."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceDataModule(world.text_tokenizer(), str(path), validation_fraction=0, max_length=1_000_000)
    written = {f"{path}, line {number}": row for number, row in enumerate(rows, 1)}
    for read in data.preference_rows("train"):
        row = written[read["place"]]
        for side in ("chosen", "rejected"):
            said = ids_to_bytes(world.tokenizer(), read[f"{side}_ids"])
            for name in ("prompt", side):
                for text in texts(row.get(name)):
                    if json.dumps(text)[1:-1].encode() not in said and text.encode() not in said:
                        raise WrongError(f"expected {text!r} of {name} in the tokens, got {said!r}")


def texts(value):
    """A text, or the contents of messages."""
    if isinstance(value, str):
        return [value]
    return [m["content"] for m in value or [] if isinstance(m.get("content"), str)] if isinstance(value, list) else []


KINDS = [Kind("rows of anything", ROWS, check_anything, 6)]
