"""Pages show what models and people wrote, and nothing of it acts: no element, link or column comes from outside."""

import csv
import dataclasses
import json
from collections import Counter
from html.parser import HTMLParser

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from ppo_helpers import ensemble as rewards
from ppo_helpers import ppo_module
from study_experiments import Toy

from examples.sentiment.report import page
from lit_vapo.commands.cards import ensemble_card, policy_card
from lit_vapo.commands.markdown import block, cell, code, line
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.study.execution import Study, run
from lit_vapo.study.experiment import Record
from lit_vapo.study.report import report
from lit_vapo.study.summary import Analysis

EVIL = (
    "<script>alert(1)</script></pre></table>|`a``b```\n```\n</td><img src=x onerror=alert(1)>\n| b |\n\n## c\n"
    "[l](javascript:alert(1)) ![i](http://there/x.png) \\| \\"
)


class Elements(HTMLParser):
    """The elements of a page, their attributes that act, the cells of each row, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.acting, self.rows, self.text = Counter(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.acting += [(tag, k, v) for k, v in attributes if k.startswith("on") or k in ("href", "src")]
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += 1

    def handle_data(self, data):
        self.text += data


def rendered(markdown):
    return Elements(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


def tame(elements, pictures=""):
    """Nothing acts, and every row of a table has as many cells as the first of its kind."""
    assert not elements.tags.keys() & {"script", "iframe", "object", "a", "form"}
    assert all(key == "src" and value.startswith(pictures) for _, key, value in elements.acting), elements.acting


class Evil(Toy):
    """Its methods, settings and failures have names that want to act."""

    @property
    def settings(self):
        return {EVIL: {EVIL: 1}}

    def repeat(self, setting, repetition):
        if repetition.number == 3:
            raise RuntimeError(EVIL)
        gain = float(repetition.number)
        return [Record(name, setting, *repetition, [0.1, 2.0], [1.0, gain], 0.5) for name in (EVIL, "calm")]


# Labels that leave a picture no room.
crowded = pytest.mark.filterwarnings("ignore:constrained_layout not applied:UserWarning")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "a <script>[x](y) `z` | w"
    study = Study(Evil(), str(folder), repetitions=5, analysis=Analysis(baselines=["calm"]))
    config = {"experiment": {EVIL: EVIL}, "seed": 0, "repetitions": 5}
    report(study, config, run(study, config))
    return folder


@crowded
def test_the_page_of_a_study_is_tame(study):
    elements = Elements((study / "report.html").read_text())
    tame(elements, "data:image/png;base64,")
    assert "<script>alert(1)</script></pre>" in elements.text
    assert len(set(elements.rows)) <= 2  # methods, and comparisons
    assert elements.tags["pre"] == elements.tags["details"] == 1
    assert elements.tags["h2"] == sum(text.startswith("## ") for text in (study / "report.md").read_text().splitlines())


@crowded
def test_the_markdown_of_a_study_is_tame(study):
    elements = rendered((study / "report.md").read_text())
    tame(elements, "pictures/")
    assert "<script>alert(1)</script></pre>" in elements.text
    sizes = Counter(elements.rows)
    assert len(sizes) == 2
    assert elements.tags["table"] == 2
    page = Elements((study / "report.html").read_text())
    assert (elements.rows, elements.tags["h2"], elements.tags["li"]) == (page.rows, page.tags["h2"], page.tags["li"])


def test_the_page_of_the_demo_is_tame(tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    record = {"prompt": EVIL, "response": EVIL, "policy": EVIL, "members": [1.0, -1.0]}
    record |= {"gold": 0.5, "reward": 0.0, "sigma": 1.0, "kl": 1.0}
    quality = {"accuracy": 0.5, "nll": 0.5, "ece": 0.5}
    summary = {"gold_reference": 0.1, "gold_policy": 0.2, "gold_gain": 0.1, "gold_gain_95": [0.0, 0.2]}
    summary |= {"sequence_kl_k1": 1.0, "samples_each": 1, "judge": quality}
    summary |= {"reward_model": {"members": [quality], "mean": quality}}
    pictures = dict.fromkeys(("reward_against_kl", "over_training", "before_and_after"), picture)
    elements = Elements(page(summary, pictures, [record], [record]))
    tame(elements, "data:image/png;base64,")
    assert elements.text.count("<script>alert(1)</script></pre>") == 4 + 1
    assert elements.tags["table"] == 1 + 2 + 1  # the prompts', their members', the models'


def policy(tiny_model_dir, tmp_path):
    module = ppo_module(tiny_model_dir, rewards(tmp_path / "ensemble", tiny_model_dir))
    module.hparams["reward"] = EVIL
    module.base = dataclasses.replace(module.base, path=EVIL)
    module.hparams["base"] = {"path": EVIL}
    module.figures = {f"val/{EVIL}": 1.0, "val/gold": 0.5}
    return policy_card(module, tmp_path, EVIL)


def ensemble(tiny_model_dir, tmp_path, classifier=False):
    module = RewardModule(Pretrained(tiny_model_dir))
    module.spec.base = dataclasses.replace(module.spec.base, path=EVIL)
    module.spec.pooling = EVIL
    module.hparams["base"] = {"path": EVIL}
    module.figures = {EVIL: 1.0}
    return ensemble_card(module, EVIL, classifier)


def classifier(tiny_model_dir, tmp_path):
    return ensemble(tiny_model_dir, tmp_path, classifier=True)


@pytest.mark.parametrize("card", [policy, ensemble, classifier])
def test_a_model_card_is_tame(card, tiny_model_dir, tmp_path):
    card(tiny_model_dir, tmp_path).save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.base_model == EVIL
    elements = rendered(read.text)
    tame(elements)
    assert set(elements.rows) == {2}
    assert elements.tags["table"] == 2
    assert elements.tags["pre"] == 2
    # The title, what to do, configuration and figures: no heading of anybody else's.
    assert (elements.tags["h1"], elements.tags["h2"]) == (1, 3)
    assert "<script>alert(1)</script></pre>" in elements.text


def test_scores_of_responses_are_read_back_as_they_were(tmp_path):
    import torch

    from lit_vapo.evaluation.preference_files import write_scores
    from lit_vapo.types import RewardEstimate

    members = torch.tensor([[1.0, 2.0]])
    estimate = RewardEstimate(members.mean(1), members.var(1), members, None)
    write_scores(tmp_path / "scores.csv", estimate, [EVIL], ["chosen"], [EVIL])
    with (tmp_path / "scores.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["response"] == row["place"] == EVIL
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("text", [EVIL, "`", "``", "a`", "`b", "", "plain", "a\\", "|", "\n"])
def test_every_way_to_write_a_text_keeps_it_together(text):
    words = " ".join(text.split())
    table = rendered(f"| a | b |\n| --- | --- |\n| {cell(text)} | end |\n")
    tame(table)
    assert table.rows == [2, 2]
    assert table.text.split() == ["a", "b", *words.split(), "end"]
    if words:
        span = rendered(f"so {code(text)} it is")
        assert span.tags.keys() == {"p", "code"}
        assert span.text.split() == ["so", *words.split(), "it", "is"]
    fenced = rendered(f"{block(text, 'yaml')}\n\nend")
    assert fenced.tags == {"pre": 1, "code": 1, "p": 1}
    tame(rendered(line(f"**bold** {text} end")))
