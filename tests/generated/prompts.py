"""Files of prompts: the policy reads what the file says, token for token."""

import json
from typing import Any, NamedTuple

from hypothesis import strategies as st

from lit_vapo.data.datamodule import PromptDataModule
from tests.generated import world
from tests.generated.outcome import Kind, WrongError
from tests.generated.pairs import TOOL, Meaning, absent_or, dumps, messages, spoilt_lines
from tests.generated.reading import check_tokens, opening
from tests.generated.texts import NO_TEXT, TEXT


class Prompts(NamedTuple):
    """Lines with what they mean (`None`: to be refused), and whether others are left out."""

    lines: list[tuple[bytes, Meaning | None]]
    skip_invalid: bool


@st.composite
def lines(draw, conversations):
    """A line with a prompt, or with something else."""
    tools, prompt = None, draw(TEXT)
    values: dict[str, Any] = {"prompt": prompt}
    if conversations:
        prompt, tools = draw(messages()), draw(absent_or(st.lists(TOOL, min_size=1, max_size=2)))
        as_json = draw(st.booleans())
        values = {"prompt": json.dumps(prompt) if as_json else prompt}
        if tools is not None:
            values["tools"] = json.dumps(tools) if as_json else tools
    values |= draw(st.dictionaries(st.sampled_from(("id", "answer")), TEXT, max_size=1))
    if draw(st.integers(0, 2)):
        return dumps(values, draw(st.booleans())), Meaning(prompt, "", "", {}, tools)
    changes = [
        st.just(dumps({**values, "prompt": None}, True)),
        st.just(dumps({"question" if name == "prompt" else name: x for name, x in values.items()}, True)),
        st.sampled_from(([], "\ud800", [{"role": "user"}], [{"content": "x"}], [[]])).map(
            lambda bad: dumps({**values, "prompt": bad}, True)
        ),
        NO_TEXT.map(lambda bad: dumps({**values, "prompt": bad}, True)),
        spoilt_lines(dumps({**values, "prompt": prompt}, True)),
    ]
    return draw(st.one_of(changes)), None


FILES = st.booleans().flatmap(
    lambda conversations: st.builds(Prompts, st.lists(lines(conversations), min_size=1, max_size=3), st.booleans())
)


def check_prompts(file: Prompts, folder) -> None:
    """Read the file and compare."""
    path = folder / "prompts.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line, _ in file.lines))
    right = [meaning for _, meaning in file.lines if meaning is not None]
    sound = bool(right) and (file.skip_invalid or len(right) == len(file.lines))
    try:
        data = PromptDataModule(
            world.text_tokenizer(),
            prompts=str(path),
            validation_fraction=0,
            max_prompt_length=1_000_000,
            skip_invalid=file.skip_invalid,
        )
        rows = data.prompt_rows("train")
    except ValueError as error:
        if sound:
            raise WrongError(f"refused though all is well: {error}") from error
        raise
    if not sound or len(rows) != len(right):
        raise WrongError(f"read {len(rows)} prompts of {len(file.lines)} lines, of which {len(right)} are some")
    for row, meaning in zip(rows, right, strict=True):
        check_tokens("prompt", opening(meaning), row["prompt_ids"])


KINDS = [Kind("prompts", FILES, check_prompts, 7)]
