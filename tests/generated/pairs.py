"""Preferences in all shapes, sound ones and others, with what each of them means."""

import json
import os
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.generated.texts import LETTERS, NO_TEXT, TEXT

ASKS, ANSWERS = "\n\nHuman:", "\n\nAssistant:"
Messages = list[dict[str, Any]]


class Meaning(NamedTuple):
    """What a row says: texts or messages, and the labels."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    labels: dict[str, Any]
    tools: list[dict[str, Any]] | None = None


class Written(NamedTuple):
    """A row as a line of a file, its columns if it has some, and what it means.

    In place of a meaning: `BAD`, it is to be refused; `USELESS`, it says something that is of no use, and is left out.
    """

    line: bytes
    values: dict[str, Any] | None
    meaning: Meaning | str


BAD, USELESS = "bad", "useless"


def absent_or(strategy):
    return st.one_of(st.none(), strategy)


@st.composite
def labels(draw):
    """Columns of labels, and what they say."""
    margin = draw(absent_or(st.one_of(st.integers(-5, 5), st.floats(-1e4, 1e4))))
    weight = draw(absent_or(st.one_of(st.integers(0, 5), st.floats(0, 1e4))))
    subset = draw(absent_or(LETTERS))
    agreement, tie = draw(absent_or(st.floats(0.5, 1))), draw(absent_or(st.booleans()))
    if tie:
        agreement, margin = draw(st.sampled_from((None, 0.5))), None
    if agreement == 0.5:
        margin = None
    columns = {"margin": margin, "weight": weight, "subset": subset, "agreement": agreement, "tie": tie}
    kept = {name: value for name, value in columns.items() if value is not None or draw(st.booleans())}
    says = {
        "margin": float(margin or 0),
        "weight": 1.0 if weight is None else float(weight),
        "subset": subset,
        "probability": 0.5 if tie else 1.0 if agreement is None else agreement,
    }
    return kept, says


@st.composite
def text_rows(draw):
    """A prompt and two responses."""
    columns, says = draw(labels())
    prompt = draw(TEXT)
    # A response that begins with the prompt may have it twice, and nobody can tell.
    response = TEXT.filter(lambda text: not text.startswith(prompt))
    chosen, rejected = draw(st.tuples(response, response).filter(lambda pair: pair[0] != pair[1]))
    values = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}
    return values, Meaning(prompt, chosen, rejected, says)


@st.composite
def dialogue_rows(draw, way):
    """Two dialogues, as those of HH-RLHF: `whole`, `both` with the prompt besides, or the `parts`."""
    columns, says = draw(labels())
    turns = draw(st.lists(st.tuples(TEXT, TEXT), max_size=2))
    shared = "".join(f"{ASKS} {ask}{ANSWERS} {answer}" for ask, answer in turns) + f"{ASKS} {draw(TEXT)}{ANSWERS}"
    a, b = draw(st.tuples(TEXT, TEXT).filter(lambda pair: pair[0] != pair[1]))
    chosen, rejected = f"{shared} {a}", f"{shared} {b}"
    common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 – letter by letter, as it should be
    # What both say first may hold a turn, too.
    prompt = common[: common.rfind(ANSWERS) + len(ANSWERS)] if way == "whole" else shared
    responses = chosen[len(prompt) :], rejected[len(prompt) :]
    meaning = Meaning(prompt, *responses, says) if all(response.strip() for response in responses) else USELESS
    sides = responses if way == "parts" else (chosen, rejected)
    columns |= dict(zip(("chosen", "rejected"), sides, strict=True)) | ({} if way == "whole" else {"prompt": prompt})
    return columns, meaning


CALL = st.builds(
    lambda name, value: {"type": "function", "function": {"name": name, "arguments": {"x": value}}}, LETTERS, TEXT
)
TOOL = st.builds(
    lambda name, text: {"type": "function", "function": {"name": name, "description": text}}, LETTERS, TEXT
)


@st.composite
def messages(draw, single=False):
    """A conversation that waits for an answer; `single`: the user's message alone."""
    asked = [{"role": "user", "content": draw(TEXT)}]
    if single:
        return asked
    found = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        found += [{"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(TEXT)}]
    return found + asked


@st.composite
def answers(draw, turns):
    """What the assistant says, perhaps over several turns (if `turns`), perhaps by calling a tool."""
    first = {"role": "assistant", "content": draw(TEXT)}
    if draw(st.integers(0, 3)) == 0:
        first = {"role": "assistant", "content": draw(st.sampled_from((None, ""))), "tool_calls": [draw(CALL)]}
    if turns and draw(st.integers(0, 3)) == 0:
        return [first, {"role": "user", "content": draw(TEXT)}, {"role": "assistant", "content": draw(TEXT)}]
    return [first]


def said(message):
    """What a message says, as far as two are the same or not."""
    return (message["content"] or "").strip(), message.get("tool_calls")


def filled(value, keys):
    """Messages as they are stored in columns: what some of them lack is null."""
    return [dict.fromkeys(keys) | message for message in value] if isinstance(value, list) else value


@st.composite
def message_rows(draw, prompt_as, answers_as):
    """A conversation and two answers.

    Args:
        draw: Draws.
        prompt_as: `messages`, `text`, `json` or `nothing`.
        answers_as: `answers` alone, or the `whole` conversations.
    """
    columns, says = draw(labels())
    prompt = draw(messages(single=prompt_as == "text"))
    answer = answers(turns=answers_as == "whole")
    chosen, rejected = draw(st.tuples(answer, answer).filter(lambda pair: said(pair[0][0]) != said(pair[1][0])))
    tools = draw(absent_or(st.lists(TOOL, min_size=1, max_size=2)))
    both = {"chosen": chosen, "rejected": rejected}
    if answers_as == "whole":
        both = {side: prompt + answer for side, answer in both.items()}
    ways = {"messages": prompt, "text": prompt[0]["content"], "json": json.dumps(prompt)}
    columns |= both | ({"prompt": ways[prompt_as]} if prompt_as in ways else {})
    if draw(st.booleans()):
        keys = {key for message in (*prompt, *chosen, *rejected) for key in message}
        columns |= {name: filled(columns[name], keys) for name in ("prompt", *both) if name in columns}
    if tools is not None or draw(st.booleans()):
        columns["tools"] = json.dumps(tools) if tools is not None and draw(st.booleans()) else tools
    return columns, Meaning(prompt, chosen, rejected, says, tools)


SHAPES = {
    "texts": text_rows(),
    **{f"dialogues, {way}": dialogue_rows(way) for way in ("whole", "both", "parts")},
    **{
        f"messages, prompt as {prompt_as}, {answers_as}": message_rows(prompt_as, answers_as)
        for prompt_as in ("messages", "text", "json", "nothing")
        for answers_as in ("answers", "whole")
        if (prompt_as, answers_as) != ("nothing", "answers")
    },
}
DIALOGUES = [rows for name, rows in SHAPES.items() if name.startswith("dialogues")]
MESSAGES = [rows for name, rows in SHAPES.items() if name.startswith("messages")]


# What spoils a row whatever its shape: the columns with something wrong in one of them.

BAD_LABELS = {
    "margin": st.sampled_from(("1", True, [], 10**400)),
    "weight": st.one_of(st.sampled_from(("1", False, {}, 10**400)), st.floats(-1e9, -1e-9)),
    "agreement": st.one_of(st.floats(-1e9, 0.49), st.floats(1.01, 1e9), st.sampled_from(("0.9", True, []))),
    "tie": st.sampled_from(("yes", 1, 0.5, [])),
    "subset": st.one_of(st.integers(), st.lists(LETTERS), st.just({})),
}


@st.composite
def spoilt_values(draw, row):
    """The columns with something wrong in one of them, or with two responses of which one is none."""
    values, meaning = row
    side = draw(st.sampled_from(("chosen", "rejected")))
    name = draw(st.sampled_from(sorted(BAD_LABELS)))
    is_text = isinstance(values[side], str)
    if meaning != USELESS and draw(st.integers(0, 2)) == 0:
        blank = draw(st.sampled_from(("", " ", "\n\t ")))
        none = [{"role": "assistant", "content": blank}]
        before = values[side][: len(values[side]) - len(getattr(meaning, side))]
        changes = [{side: before + (blank if is_text else none)}, {"chosen": values["rejected"]}]
        return {**values, **draw(st.sampled_from(changes))}, USELESS
    changes = [
        {name: draw(BAD_LABELS[name])},
        {side: draw(NO_TEXT.filter(lambda value: is_text or value != []))},
        {side: None},
        {"images": [draw(LETTERS)]},
    ]
    if is_text:
        changes.append({side: values[side] + "\ud800"})
    else:
        last = values[side][-1]
        odd = draw(st.sampled_from(({"role": 1}, {"content": 1}, {"content": last["role"] + "\udfff"}, {"role": None})))
        changes += [{side: [*values[side][:-1], {**last, **odd}]}, {side: [*values[side], draw(NO_TEXT)]}]
    if is_text and isinstance(values.get("prompt"), str):
        changes += [{"prompt": draw(NO_TEXT)}, {"system": draw(TEXT)}]
    return {**values, **draw(st.sampled_from(changes))}, BAD


@st.composite
def spoilt_lines(draw, line):
    """A line that is no JSON object, or not one alone."""
    inner = line.removesuffix(b"}")
    endings = (b"9" * 5000, b"[" * 100_000 + b"]" * 100_000, b"NaN", b"-Infinity", b"tru", b"'x'", b'"\xff"')
    return draw(
        st.one_of(
            st.integers(1, len(line) - 1).map(lambda size: line[:size]),
            st.sampled_from(endings).map(lambda end: inner + b', "note": ' + end + b"}"),
            st.sampled_from((b"1", b"null", b'"text"', b"NaN", b"{}", b"{}{}", b"\xff\xfe")),
            st.just(inner + b", " + json.dumps(next(iter(json.loads(line)))).encode() + b': "again"}'),
            st.just(line + b" " + line),
        )
    )


def dumps(values, ascii_only):
    return json.dumps(values, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


@st.composite
def written(draw, rows, lines=True, names=None):
    """A row with what it means, or a spoilt one; `lines`: it may be no JSON at all; `names`: others for its columns."""
    values, meaning = row = draw(rows)
    ascii_only = draw(st.booleans())
    if draw(st.integers(0, 2)) == 0:
        if lines and draw(st.booleans()):
            return Written(draw(spoilt_lines(dumps(values, True))), None, BAD)
        values, meaning = draw(spoilt_values(row))
        ascii_only = True
    extra = draw(st.dictionaries(st.sampled_from(("id", "source", "é", "")), st.one_of(st.none(), TEXT), max_size=2))
    pairs = draw(st.permutations(list({**values, **extra}.items())))
    values = {(names or {}).get(name, name): value for name, value in pairs}
    return Written(dumps(values, ascii_only), values, meaning)
