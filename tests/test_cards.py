"""Model cards say what a policy was trained against, however its reward was given."""

import pytest
from huggingface_hub import ModelCard
from ppo_helpers import ensemble, ppo_module

from lit_vapo.commands.cards import policy_card
from lit_vapo.rewards import EnsembleReward
from lit_vapo.rewards.source import RewardSource


class Constant(RewardSource):
    """A source of one's own."""

    num_members = 2

    def score(self, responses):
        raise NotImplementedError


@pytest.fixture(scope="module")
def rewards(tiny_model_dir, tmp_path_factory):
    return ensemble(tmp_path_factory.mktemp("cards") / "ensemble", tiny_model_dir)


def card(tiny_model_dir, reward, tmp_path):
    made = policy_card(ppo_module(tiny_model_dir, reward), tmp_path, 'my "policy" <1>')
    made.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_a_card_names_the_source_of_rewards(tiny_model_dir, rewards, tmp_path):
    text = card(tiny_model_dir, str(rewards), tmp_path).text
    assert f"against rewards from `{rewards}`." in text
    text = card(tiny_model_dir, EnsembleReward(str(rewards)), tmp_path).text
    assert f"against rewards from `EnsembleReward` in `{rewards}`." in text
    text = card(tiny_model_dir, Constant(), tmp_path).text
    assert "against rewards from `Constant`." in text
    assert f"class_path: {Constant.__module__}.Constant" in text


def test_a_card_is_one_that_the_hub_reads(tiny_model_dir, rewards, tmp_path):
    read = card(tiny_model_dir, str(rewards), tmp_path)
    assert read.data.base_model == str(tiny_model_dir)
    assert read.data.pipeline_tag == "text-generation"
    assert "VarianceAware" in read.data.tags
    # Names are written as they are: neither as HTML nor so that they end the string.
    assert r'folder = "my \"policy\" <1>"' in read.text
    assert (tmp_path / "README.md").read_text().endswith("The checkpoint holds none.\n")
