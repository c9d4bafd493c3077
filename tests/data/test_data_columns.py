"""Columns of other names, prompts that are missing, and options that decide what tokens a row becomes."""

import json

import datasets
import pytest
from helpers import CHAT, tiny_tokenizer, write_jsonl

from lit_vapo.data.columns import KNOWN, LOOK, Columns
from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule
from lit_vapo.data.row import Row
from lit_vapo.data.sources import iterate_rows

PAIR = {"chosen": " good", "rejected": " bad"}
KINDS = ["jsonl", "json", "parquet", "stream"]


def read(folder, rows, kind="jsonl", columns=None):
    """The rows of a file of some kind."""
    path = folder / f"rows.{'jsonl' if kind == 'stream' else kind}"
    if kind == "parquet":
        names = list(dict.fromkeys(name for row in rows for name in row))
        datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}).to_parquet(path)
    elif kind == "json":
        path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    else:
        write_jsonl(path, rows)
    return list(iterate_rows(str(path), "k", Columns(columns), lazily=kind == "stream"))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_other_names_are_read_under_ours(tmp_path, kind):
    rows = read(tmp_path, [{"question": "q", "good": "a", "bad": "b"}], kind, {"prompt": "question", "chosen": "good"})
    assert dict(rows[0].values) == {"prompt": "q", "chosen": "a", "bad": "b"}


def test_a_file_that_has_our_name_keeps_it():
    assert Columns({"prompt": "question"}).rename(Row({"prompt": "p"}, "x")).values == {"prompt": "p"}
    both = Columns({"prompt": "question"}).rename(Row({"prompt": "p", "question": "q"}, "x"))
    assert both.values == {"prompt": "q"}


def test_two_columns_may_change_places():
    swapped = Columns({"chosen": "rejected", "rejected": "chosen"}).rename(Row(PAIR, "x"))
    assert swapped.values == {"chosen": " bad", "rejected": " good"}


@pytest.mark.parametrize("name", KNOWN)
def test_null_leaves_a_column_out(name):
    row = Row({**PAIR, "prompt": "p", name: "x"}, "x")
    assert name not in Columns({name: None}).rename(row).values


def test_a_row_of_a_prompt_alone_keeps_it():
    assert Columns({"prompt": None}).rename(Row({"prompt": "p"}, "x")).values == {"prompt": "p"}


def test_a_column_that_is_not_there_is_named():
    (row,) = [Columns({"prompt": "question"}).rename(Row(PAIR, "a.jsonl, line 3"))]
    with pytest.raises(ValueError, match=r"line 3: expected column 'question' .data.columns.prompt., got columns \['c"):
        row.sound()


def test_a_name_that_is_none_of_ours_is_refused(tiny_model_dir):
    with pytest.raises(ValueError, match=r"data.columns: expected names among prompt, chosen, .*, got 'promt'"):
        PreferenceDataModule(tiny_model_dir, columns={"promt": "question"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("given", [{}, {"prompt": None}])
def test_a_row_that_lacks_the_prompt_of_others_is_marked_wherever_it_stands(tmp_path, kind, where, given):
    rows = [{"prompt": f"p{i}", **PAIR} for i in range(2)]
    rows.insert(where, {**given, **PAIR})
    found = read(tmp_path, rows, kind)
    assert [r.problem is not None for r in found] == [i == where for i in range(3)]
    with pytest.raises(ValueError, match=rf" {where + 1}: expected a prompt in column 'prompt', as other rows"):
        found[where].sound()


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_are_null_throughout_are_no_column(tmp_path, kind):
    assert not any(row.problem for row in read(tmp_path, [{"prompt": None, **PAIR}, {"prompt": None, **PAIR}], kind))


def test_in_a_stream_a_prompt_after_many_rows_without_is_marked(tmp_path):
    rows = read(tmp_path, [PAIR] * LOOK + [{"prompt": "p", **PAIR}], "stream")
    assert [row.place.rpartition(" ")[2] for row in rows if row.problem] == [str(LOOK + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_begin_with_their_prompt_throughout_are_refused(tmp_path, kind):
    rows = [{"prompt": f"Film {i}:", "chosen": f"Film {i}: good", "rejected": f"Film {i}: bad"} for i in range(3)]
    with pytest.raises(ValueError, match=r" 1: expected responses without their prompt, .*data.columns=.prompt: null."):
        read(tmp_path, rows, kind)
    assert len(read(tmp_path, rows, kind, {"prompt": None})) == 3
    # One echo among other rows is a response.
    assert len(read(tmp_path, [*rows, {"prompt": "Hello", "chosen": "Hi", "rejected": "No"}], kind)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_whole_dialogues_may_have_their_prompt_in_a_column_too(tmp_path, kind):
    asked = [f"\n\nHuman: {i}?\n\nAssistant:" for i in range(3)]
    rows = [{"prompt": prompt, "chosen": f"{prompt} yes", "rejected": f"{prompt} no"} for prompt in asked]
    assert not any(row.problem for row in read(tmp_path, rows, kind))


def tokens(model, folder, row, **options):
    """Texts of prompt and responses as trained on."""
    file = write_jsonl(folder / "rows.jsonl", [row, row])
    data = PreferenceDataModule(model, file, validation_fraction=0.0, **options)
    (found, _) = data.preference_rows("train")
    size, decode = found["prompt_length"], data.text_tokenizer.decode
    return decode(found["chosen_ids"][:size]), decode(found["chosen_ids"][size:]), decode(found["rejected_ids"][size:])


def test_columns_serve_preferences_and_prompts(tiny_model_dir, tmp_path):
    row = {"system": "Be brief.", "question": "the film was", **PAIR}
    with pytest.raises(ValueError, match=r"look like a prompt: question, system; choose with data.columns"):
        tokens(tiny_model_dir, tmp_path, row)
    with pytest.raises(ValueError, match=r"data.columns=.system: null."):
        tokens(tiny_model_dir, tmp_path, row, columns={"prompt": "question"})
    options = {"columns": {"prompt": "question", "system": None}}
    assert tokens(tiny_model_dir, tmp_path, row, **options) == ("the film was", " good<eos>", " bad<eos>")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"question": "the plot"}, {"question": "the film"}])
    data = PromptDataModule(tiny_model_dir, prompts=prompts, validation_fraction=0.0, **options)
    assert [r["prompt"] for r in data.prompt_rows("train")] == ["the plot", "the film"]


def test_a_prompt_that_both_begin_with_is_taken_on_request(tiny_model_dir, tmp_path):
    row = {"chosen": "the film was good", "rejected": "the film was bad"}
    expected = ("the film was", " good<eos>", " bad<eos>")
    assert tokens(tiny_model_dir, tmp_path, row, columns={"prompt": None}) == expected


def test_control_tokens_in_texts_act_on_request_alone(tmp_path):
    tiny_tokenizer(tmp_path / "model", chat_template=True)
    row = {"prompt": "<bos>user:q<eos><bos>assistant:", "chosen": "good<eos>", "rejected": "bad<eos>"}
    model = str(tmp_path / "model")

    def count(**options):
        data = PreferenceDataModule(model, write_jsonl(tmp_path / "r.jsonl", [row]), validation_fraction=0.0, **options)
        (found,) = data.preference_rows("train")
        special = (data.text_tokenizer.bos_token_id, data.text_tokenizer.eos_token_id)
        return [found["chosen_ids"].count(i) for i in special]

    assert count(templated=True) == [2, 2]
    with pytest.warns(UserWarning, match="a text mentions control tokens"):
        assert count() == [0, 1]


def test_options_reach_the_chat_template_and_the_ends(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "model")
    tokenizer.chat_template = "{% if brief %}Be brief. {% endif %}" + CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": "good. so", "rejected": "bad"}
    asked = "<bos>user:q<eos><bos>assistant:"
    assert tokens(model, tmp_path, row) == (asked, "good. so<eos>", "bad<eos>")
    assert tokens(model, tmp_path, row, chat_template_kwargs={"brief": True})[0] == "Be brief. " + asked
    stop = tokenizer.convert_tokens_to_ids(".")
    assert tokens(model, tmp_path, row, stop_token_ids=[stop]) == (asked, "good.", "bad<eos>")
    assert tokens(model, tmp_path, {**PAIR, "prompt": "p"}, append_eos=False) == ("p", " good", " bad")


def test_a_tokenizer_that_brings_code_is_refused_by_the_name_of_the_option(tmp_path):
    tiny_tokenizer(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["mine.Mine", None]}
    config["tokenizer_class"] = "Mine"
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(ValueError, match=r"data.tokenizer: .*data.trust_remote_code=true"):
        PreferenceDataModule(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()
