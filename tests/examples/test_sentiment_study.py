"""The demo as a study, on a toy model: what is drawn, what a repetition learns from, what it is judged by."""

import json
from pathlib import Path

import helpers
import pytest
import torch
import yaml
from helpers import CONFIGS
from jsonargparse import ArgumentParser
from safetensors.torch import save_file

import examples.sentiment.responses as responses_module
import examples.sentiment.study as study_module
from examples.sentiment.study import SentimentStudy
from lit_vapo.data.encoder import Encoder
from lit_vapo.data.tokenise import stable_id
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.stages.ppo.update import UpdateSettings
from lit_vapo.study.execution import Study
from lit_vapo.study.experiment import Repetition
from lit_vapo.study.experiments.language import Training
from lit_vapo.study.experiments.responses import KnownResponses
from lit_vapo.types import Prompt, TextReward

WIDTH, PAIRS = 32, 40


class CountsLetters(TextReward):
    """Stands for the judge."""

    def __call__(self, prompts, responses):
        return torch.tensor([float(len(response)) for response in responses])


def identities(folder):
    """Of the demo's prompts."""
    lines = (folder / "data" / "prompts_train.jsonl").read_text().splitlines()
    return [stable_id(json.loads(line)["prompt"]) for line in lines]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder as the demo's, with what the study reads of it."""
    folder = tmp_path_factory.mktemp("demo")
    base = folder / "policy-base"
    helpers.tiny_model(base, helpers.tiny_tokenizer(base), layers=1)
    (folder / "data").mkdir()
    helpers.tiny_prompts(folder / "data" / "prompts_train.jsonl", 32)
    (folder / "study").mkdir()
    number = torch.arange(PAIRS)[:, None].expand(PAIRS, WIDTH).float()
    # The better response of pair i is i + 1 in every feature, the worse one −(i + 1).
    features = {"chosen": number + 1, "rejected": -number - 1, "reference": torch.randn(64, WIDTH)}
    prompts = [
        json.loads(line)["prompt"] for line in (folder / "data" / "prompts_train.jsonl").read_text().splitlines()
    ]
    features["prompt_ids"] = torch.tensor([stable_id(prompt) for prompt in prompts])
    features["prompt_values"] = torch.full((len(prompts),), 5.5)
    save_file({name: x.contiguous() for name, x in features.items()}, folder / "study" / "features.safetensors")
    return folder


def study(demo, pairs=20, flipped=0.25, tokens=study_module.RESPONSE_TOKENS):
    sampling, update = Sampling(tokens, num_responses=2), UpdateSettings(epochs=1, minibatches=1)
    training = Training(iterations=2, batch_size=4, sampling=sampling, update=update)
    experiment = SentimentStudy(str(demo), {"mean": MeanReward()}, [pairs], [flipped], training=training, steps=5)
    # The toy has one layer and no judge.
    spec = FeatureSpec(Pretrained(str(demo / "policy-base")), pooling="mean")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "SentimentJudge", lambda path: CountsLetters())
        patch.setattr(study_module, "feature_spec", lambda path: spec)
        assert experiment.truth.spec == spec
    return experiment


def test_pairs_are_the_demos_each_once_and_some_are_turned_round(demo):
    experiment = study(demo)
    drawn = experiment.preferences(PAIRS, 0.25, seed=0)
    number = drawn.chosen[:, 0].abs()
    assert sorted(number.tolist()) == [float(i + 1) for i in range(PAIRS)]
    assert torch.equal(drawn.chosen, -drawn.rejected)
    assert 4 <= int((drawn.chosen[:, 0] < 0).sum()) <= 18
    assert (experiment.preferences(PAIRS, 0.0, seed=0).chosen > 0).all()
    assert torch.equal(experiment.preferences(PAIRS, 0.25, seed=0).chosen, drawn.chosen)
    assert not torch.equal(experiment.preferences(PAIRS, 0.25, seed=1).chosen, drawn.chosen)


def test_a_repetition_is_judged_by_the_judge(demo):
    experiment = study(demo)
    (setting,) = experiment.settings
    (record,) = experiment.run(setting, Repetition(0, 3))
    assert record.reference_return == 5.5
    # Tokens of a few letters each, and no score of a head.
    assert all(4 <= x <= 160 for x in record.true_return)
    assert bool(experiment.ensemble(experiment.settings[setting], 3).calibrated)


def test_prepared_features_are_what_an_ensemble_reads(tmp_path, monkeypatch):
    base = tmp_path / "policy-base"
    helpers.tiny_model(base, helpers.tiny_tokenizer(base), layers=2)
    (tmp_path / "data").mkdir()
    helpers.tiny_prompts(tmp_path / "data" / "prompts_train.jsonl", 8)
    rows = [{"prompt": "the film", "chosen": " was good", "rejected": " was very bad"}] * 2
    (tmp_path / "data" / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A layer that is not the last, as in the demo.
    spec = FeatureSpec(Pretrained(str(base)), pooling="mean", layer=1)
    monkeypatch.setattr(study_module, "feature_spec", lambda demo: spec)
    monkeypatch.setattr(study_module, "SentimentJudge", lambda path: CountsLetters())
    study_module.prepare(str(tmp_path))
    found = SentimentStudy(str(tmp_path), {"mean": MeanReward()}, [2], [0.0]).known
    head = HeadEnsemble(2)
    head.build(WIDTH)
    head.calibrate(found["reference"])
    RewardModel(spec, head, None).save_pretrained(tmp_path / "ensemble")
    model = RewardModel.from_pretrained(tmp_path / "ensemble")
    encoder = Encoder(model.load_tokenizer())
    expected = compute_features(
        model, [encoder.response(Prompt("the film"), " was good", ended=False)], torch.device("cpu")
    )
    torch.testing.assert_close(found["chosen"][:1], expected)
    assert found["reference"].shape == (8, WIDTH)
    prompts = [
        json.loads(line)["prompt"] for line in (tmp_path / "data" / "prompts_train.jsonl").read_text().splitlines()
    ]
    assert found["prompt_ids"].tolist() == [stable_id(prompt) for prompt in prompts]
    # Means of letters in eight responses.
    assert (found["prompt_values"] * 8).frac().abs().max() < 1e-3
    assert found["prompt_values"].min() > 1
    monkeypatch.setattr(responses_module, "feature_spec", lambda demo: spec)
    monkeypatch.setattr(responses_module, "SentimentJudge", lambda path: CountsLetters())
    helpers.tiny_prompts(tmp_path / "data" / "prompts_test.jsonl", 6)
    rounds = []

    def spy(model, sequences, device):
        rounds.append(sequences)
        return compute_features(model, sequences, device)

    monkeypatch.setattr(responses_module, "compute_features", spy)
    responses_module.prepare(str(tmp_path))
    known = KnownResponses.load(tmp_path / "responses")
    assert known.responses.shape == (6, responses_module.TIMES, WIDTH)
    assert torch.equal(known.chosen, found["chosen"])
    assert torch.equal(known.rejected, found["rejected"])
    # Every response has its own features and its own verdict.
    for i, sequences in enumerate(rounds):
        verdict = study_module.judged(CountsLetters(), model.load_tokenizer(), sequences)
        assert torch.equal(known.true[:, i], verdict)
        expected = compute_features(model, sequences, torch.device("cpu"))
        torch.testing.assert_close(known.responses[:, i], expected)
    assert (known.true.std(1) > 0).all()


def test_the_study_reads_what_the_demo_reads():
    demo = yaml.safe_load((CONFIGS / "reward" / "demo.yaml").read_text())["model"]
    spec = study_module.feature_spec(Path("runs/demo"))
    assert (spec.layer, spec.pooling, spec.base.path) == (demo["layer"], demo["pooling"], demo["base"]["path"])
    shipped = yaml.safe_load((CONFIGS / "study" / "sentiment.yaml").read_text())["experiment"]["init_args"]
    assert shipped["training"]["sampling"] == {"max_new_tokens": study_module.RESPONSE_TOKENS, "num_responses": 1}
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Study, as_group=False)
    parsed = parser.parse_args([f"--config={CONFIGS / 'study' / 'sentiment.yaml'}"])
    given = parser.instantiate_classes(parsed)
    assert set(given.analysis.baselines) <= set(given.experiment.methods)
    assert "Unable to serialize" not in parser.dump(parsed, skip_none=False)


def test_what_is_missing_is_named(demo, tmp_path):
    with pytest.raises(ValueError, match=r"pairs: expected at most the 40 there are, got 41"):
        study(demo).preferences(41, 0.0, seed=0)
    with pytest.raises(ValueError, match=r"expected .*features\.safetensors, which `python -m examples.*` writes"):
        study(tmp_path).preferences(4, 0.0, seed=0)
    longer = study(demo, tokens=6)
    with pytest.raises(ValueError, match=r"training\.sampling: expected .*max_new_tokens=16.*, got .*max_new_tokens=6"):
        longer.run(*longer.settings, Repetition(0, 0))
