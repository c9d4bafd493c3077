"""Level 2 on a toy model: what is planted, what is learned from, what is noted, and that repetitions are repeatable."""

import json
import logging
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from helpers import CONFIGS
from jsonargparse import ArgumentParser

from lit_vapo.advantages.gae import Gae
from lit_vapo.data.tokenise import stable_id
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained, load_tokenizer
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.objectives.single_reward import SingleReward
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.stages.ppo.update import UpdateSettings
from lit_vapo.study.execution import Study
from lit_vapo.study.experiment import Analysis, Repetition
from lit_vapo.study.experiments import language
from lit_vapo.study.experiments.language import Training
from lit_vapo.study.experiments.learned import LearnedEnsemble, draw_pairs
from lit_vapo.study.experiments.noise import KnownNoise
from lit_vapo.study.experiments.planted import PlantedOptima
from lit_vapo.study.experiments.reference_responses import feature_model, reference_responses
from lit_vapo.study.experiments.truth import PromptValues, TrueReward, Truth
from lit_vapo.types import TextReward

METHODS = {"single": SingleReward(), "mean": MeanReward(), "aware": VarianceAware()}
TOKENS = 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What the experiments need, around a random model."""
    folder = tmp_path_factory.mktemp("prepared")
    base = helpers.tiny_model(folder / "base", helpers.tiny_tokenizer(folder / "base"), layers=1)
    (folder / "data").mkdir()
    prompts = helpers.tiny_prompts(folder / "data" / "prompts.jsonl", 192)
    spec = FeatureSpec(Pretrained(base), pooling="mean")
    _, answers = reference_responses(spec, prompts, TOKENS, seed=0)
    reference = compute_features(feature_model(spec), next(answers), torch.device("cpu"))
    TrueReward.along(torch.randn(32), reference, TOKENS).save(folder / "true_reward")
    return folder


def training(**options):
    sampling = Sampling(TOKENS, num_responses=2)
    update = UpdateSettings(epochs=1, minibatches=1)
    small = {"iterations": 3, "batch_size": 8, "learning_rate": 0.02, "sampling": sampling, "update": update}
    return Training(**small | {"kl_coef": 0.3, "kl_target": None} | options)


def known(prepared, methods=METHODS, noise_ratio=(10,), **options):
    return KnownNoise(str(prepared), methods, list(noise_ratio), **{"training": training(), "kinds": 4} | options)


def learned(prepared, methods=METHODS, **options):
    return LearnedEnsemble(
        str(prepared), methods, **{"pairs": [20], "flipped": [0.3], "training": training()} | options
    )


# The true reward.


def test_true_reward_by_hand():
    # Scores 0, 2, 4 have mean 2 and standard deviation 2, so the middle one is worth 2·tanh(0) and the last 2·tanh(½).
    true = TrueReward.along(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 5.0], [2.0, 1.0], [4.0, 9.0]]))
    expected = torch.tensor([-0.924234, 0.0, 0.924234])
    torch.testing.assert_close(true(true.reference), expected)


def test_true_reward_is_kept(prepared, tmp_path):
    true = TrueReward.load(prepared / "true_reward")
    true.save(tmp_path)
    assert torch.equal(TrueReward.load(tmp_path)(true.reference), true(true.reference))
    assert TrueReward.load(tmp_path).response_tokens == TOKENS
    TrueReward(true.weight, true.bias, true.reference).save(tmp_path)
    assert TrueReward.load(tmp_path).response_tokens is None
    with pytest.raises(ValueError, match=r"expected a folder with true_reward\.safetensors, got .*nowhere"):
        TrueReward.load(tmp_path / "nowhere")


def test_some_prompts_are_easier_by_hand(prepared, tmp_path):
    weight, reference = torch.ones(2), torch.zeros(3, 2)
    prompts = PromptValues(torch.tensor([10, 20, 30]), torch.tensor([1.0, 2.0, 6.0]))
    TrueReward(weight, torch.zeros(()), reference, 4, prompts).save(tmp_path)
    prompts = TrueReward.load(tmp_path).prompts
    # (1 + 6) / 2 and (6 + 6 + 2) / 3, less 3.
    assert prompts.ease(torch.tensor([30, 10])) == pytest.approx(0.5)
    assert prompts.ease(torch.tensor([30, 30, 20])) == pytest.approx(5 / 3)
    with pytest.raises(ValueError, match="prompts: expected those that the study was prepared with, got others"):
        prompts.ease(torch.tensor([30, 40]))


def test_responses_of_the_reference_are_one_to_each_prompt_again_and_again(prepared):
    file, spec = prepared / "data" / "prompts.jsonl", FeatureSpec(Pretrained(str(prepared / "base")), pooling="mean")
    texts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    ids, answers = reference_responses(spec, file, TOKENS, seed=5)
    assert ids.tolist() == [stable_id(text) for text in texts]
    first, second = next(answers), next(answers)
    tokenizer = load_tokenizer(spec.base)
    asked = [tokenizer(text)["input_ids"] for text in texts]
    assert [s.ids[: s.prompt_length] for s in first] == [s.ids[: s.prompt_length] for s in second] == asked
    assert all(1 <= len(s.ids) - s.prompt_length <= TOKENS for s in first)
    assert [s.ids for s in first] != [s.ids for s in second]
    assert [s.ids for s in next(reference_responses(spec, file, TOKENS, seed=5)[1])] == [s.ids for s in first]


def test_returns_are_as_on_all_prompts(prepared, monkeypatch):
    plain = known(prepared, {"mean": MeanReward()})
    texts = [json.loads(line)["prompt"] for line in (prepared / "data" / "prompts.jsonl").read_text().splitlines()]
    ids = torch.tensor([stable_id(text) for text in texts])
    knowing = known(prepared, {"mean": MeanReward()})
    knowing.truth.prompts = PromptValues(ids, torch.arange(192.0))
    batches = []

    class Spy(language.TrainingCourse):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            batches.append(batch.prompts)

    (before,) = plain.run("noise_ratio=10", Repetition(0, 0))
    monkeypatch.setattr(language, "TrainingCourse", Spy)
    (after,) = knowing.run("noise_ratio=10", Repetition(0, 0))
    assert after.kl == before.kl
    assert after.reference_return == pytest.approx(95.5)
    off = [np.mean([texts.index(text) for text in batch]) - 95.5 for batch in batches]
    assert after.true_return == pytest.approx(np.array(before.true_return) - off, abs=1e-4)


# The planted noise.


def errors(experiment, count):
    """Errors (R, N, K) of many repetitions on the reference's responses, and the kinds (N,)."""
    true = experiment.truth.reward(experiment.truth.reference)[:, None]
    (params,) = experiment.settings.values()
    heads = [experiment.ensemble(params, seed) for seed in range(count)]
    found = torch.stack([head(experiment.truth.reference).members - true for head in heads])
    return found, heads[0]


@pytest.mark.parametrize("ratio", [1, 10])
def test_planted_noise_has_the_variance_it_should(prepared, ratio):
    experiment = known(prepared, noise_ratio=[ratio], members=3, noise=2.0, correlation=0.25)
    error, head = errors(experiment, 200)
    reference = experiment.truth.reference
    assert abs(float(error.mean())) < 0.1
    # Of all responses and repetitions together, the mean square is noise² = 4 by construction.
    assert float(error.square().mean()) == pytest.approx(4.0, rel=0.15)
    assert float((error[..., 0] * error[..., 1]).mean()) == pytest.approx(0.25 * 4.0, abs=0.3)
    # And of each kind σ_g², with the ratio that was asked for between the largest and the smallest.
    kind, z = head.kind(reference), head.coordinates(reference)
    shape = (1 + z.square().mean(1)) / 2
    squares = torch.stack([(error.square().mean((0, 2)) / shape)[kind == g].mean() for g in range(4)])
    assert float((squares.max() / squares.min()).sqrt()) == pytest.approx(ratio, rel=0.2)


def test_kinds_are_neither_the_good_nor_the_bad_and_the_rarest_comes_first(prepared):
    experiment = known(prepared)
    head, true = experiment.kinds_of_response, experiment.truth.reward
    z = head.coordinates(true.reference)
    correlation = z.T.corrcoef()
    torch.testing.assert_close(correlation, torch.eye(len(correlation)), atol=1e-3, rtol=0)
    score = true.reference @ true.weight
    assert float(torch.stack([z[:, 0], score]).corrcoef()[0, 1]) == pytest.approx(1, abs=1e-5)
    sizes = head.kind(true.reference).bincount(minlength=4)
    assert sizes.tolist() == sorted(sizes.tolist())
    assert len(set(sizes.tolist())) > 1


def test_worlds_say_what_is_noisy_and_repetitions_what_the_noise_is(prepared):
    one, other = known(prepared), known(prepared, world=1)
    params = one.settings["noise_ratio=10"]
    a, b, c = one.ensemble(params, 5), one.ensemble(params, 6), other.ensemble(params, 5)
    assert torch.equal(a.centres, b.centres)
    assert not torch.equal(a.offset, b.offset)
    assert not torch.equal(a.centres, c.centres)
    more = known(prepared, members=12).ensemble(params, 5)
    assert torch.equal(more.offset[:, :8], a.offset)


def test_planted_noise_is_an_ensemble_like_any_other(prepared, tmp_path):
    experiment = known(prepared)
    head = experiment.ensemble(experiment.settings["noise_ratio=10"], 3)
    reference = experiment.truth.reference
    RewardModel(experiment.truth.spec, head, None).save_pretrained(tmp_path / "ensemble")
    read = RewardModel.from_pretrained(tmp_path / "ensemble", with_backbone=False).head
    torch.testing.assert_close(read(reference).members, head(reference).members)
    assert float(read.reference_variance) == pytest.approx(float(read(reference).variance.mean()), rel=1e-5)


# The learned ensembles.


def test_preferences_say_which_response_is_better(prepared):
    true = TrueReward.load(prepared / "true_reward")
    right = draw_pairs(true, 40, 0.0, seed=1)
    assert (true(right.chosen) > true(right.rejected)).all()
    wrong = draw_pairs(true, 40, 1.0, seed=1)
    assert torch.equal(wrong.chosen, right.rejected)
    assert not torch.equal(draw_pairs(true, 40, 0.0, seed=2).chosen, right.chosen)
    with pytest.raises(ValueError, match="pairs: expected at most 96, half of the responses there are, got 97"):
        draw_pairs(true, 97, 0.0, seed=0)


def test_ensembles_learn_from_clear_preferences(prepared):
    experiment = LearnedEnsemble(str(prepared), METHODS, [90], [0.0], head_learning_rate=0.05)
    (params,) = experiment.settings.values()
    head = experiment.ensemble(params, 0)
    reference = experiment.truth.reference
    pairs = torch.stack([head(reference).mean, experiment.truth.reward(reference)])
    assert float(pairs.corrcoef()[0, 1]) > 0.6
    assert bool(head.calibrated)
    assert not torch.equal(head.weight, experiment.ensemble(params, 1).weight)
    assert torch.equal(head.weight, experiment.ensemble(params, 0).weight)
    # Its bootstrap is of the repetition as well.
    assert (head.seed, experiment.ensemble(params, 1).seed) == (0, 1)


# Runs.


@pytest.mark.parametrize("make", [known, learned])
def test_runs_are_paired_and_repeatable(prepared, make):
    experiment, before = make(prepared), logging.getLogger("lightning.pytorch").level
    (setting,) = experiment.settings
    records = experiment.run(setting, Repetition(0, 7))
    assert [r.method for r in records] == list(METHODS)
    for record in records:
        assert len(record.kl) == len(record.true_return) == 3
        # The first rollout is the reference's, and the same in all methods.
        assert record.kl[0] == pytest.approx(0, abs=1e-5)
        assert record.true_return[0] == pytest.approx(records[0].true_return[0])
        assert record.reference_return == pytest.approx(
            float(experiment.truth.reward(experiment.truth.reference).mean())
        )
    # A first step weighs no KL, as there is none yet; from the second on the methods differ.
    assert len({r.kl[2] for r in records}) == 3
    again = experiment.run(setting, Repetition(0, 7))
    assert [vars(r) for r in again] == [vars(r) for r in records]
    # What the reference says depends on the repetition's seed alone.
    other = experiment.run(setting, Repetition(1, 8))
    assert other[0].true_return[0] != records[0].true_return[0]
    # A run changes nothing that others hear of the trainer.
    assert logging.getLogger("lightning.pytorch").level == before
    # A run leaves nothing in the objective that the next repetition is given.
    assert not experiment.methods["aware"].state_dict()


def test_equal_noise_told_exactly_is_plain(prepared):
    # With the same weight everywhere the method is the mean reward: the limit that the control stands for.
    flat = VarianceAware(min_weight=1.0, max_weight=1.0)
    (plain, aware) = known(prepared, {"mean": MeanReward(), "flat": flat}).run("noise_ratio=10", Repetition(0, 3))
    assert aware.true_return == pytest.approx(plain.true_return, abs=1e-6)
    assert aware.kl == pytest.approx(plain.kl, abs=1e-6)


def test_policies_learn_the_truth_where_there_is_no_noise(prepared):
    options = training(iterations=8, batch_size=24, kl_coef=0.01)
    experiment = known(prepared, {"mean": MeanReward()}, noise=1e-3, training=options)
    (record,) = experiment.run("noise_ratio=10", Repetition(0, 1))
    assert np.mean(record.true_return[-3:]) > record.reference_return + 0.15
    assert record.kl[-1] > 0.5


def test_what_is_noted_is_what_the_rollouts_were(prepared, monkeypatch):
    experiment = known(prepared, {"mean": MeanReward()}, noise=1e-4)
    seen, kl = [], []

    class Spy(language.TrainingCourse):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            seen.append(float(trainer.callback_metrics["train/reward_mean"]))
            kl.append(float(trainer.callback_metrics["train/kl_k1"]))

    monkeypatch.setattr(language, "TrainingCourse", Spy)
    (record,) = experiment.run("noise_ratio=10", Repetition(0, 0))
    assert record.kl == kl
    # Without noise, the ensemble's mean is the truth.
    assert record.true_return == pytest.approx(seen, abs=1e-3)
    assert record.extra["objective_reward"] == pytest.approx(seen[-1])
    # With noise it is not, and what the reference says is worth the same whatever the ensemble thinks of it.
    (noisy,) = known(prepared, {"mean": MeanReward()}, noise=4.0).run("noise_ratio=10", Repetition(0, 0))
    assert noisy.true_return[0] == pytest.approx(record.true_return[0], abs=1e-6)
    assert noisy.true_return[2] != record.true_return[2]
    assert record.extra["correlation"] == pytest.approx(1.0, abs=1e-4)
    assert abs(noisy.extra["correlation"]) < 0.9


def averaged(**options):
    return training(**{"ema_decay": 0.9, "evaluations": 3, "held_out": 8} | options)


def test_points_may_be_evaluations_of_the_averaged_policy(prepared, monkeypatch):
    seen, kl = [], []

    class Spy(language.TrainingCourse):
        def on_validation_end(self, trainer, *args):
            super().on_validation_end(trainer, *args)
            seen.append(float(trainer.callback_metrics["val/reward_mean"]))
            kl.append(float(trainer.callback_metrics["val/kl_k1"]))

    monkeypatch.setattr(language, "TrainingCourse", Spy)
    experiment = known(prepared, {"mean": MeanReward()}, noise=1e-4, training=averaged())
    (record,) = experiment.run("noise_ratio=10", Repetition(0, 0))
    assert record.kl == kl
    assert len(kl) == 3
    # Without noise, the ensemble's mean is the truth, of the policy alone and not of the reference that answers, too.
    assert record.true_return == pytest.approx(seen, abs=1e-3)
    # The average lags behind the policy that learns.
    plain = replace(experiment.training, ema_decay=None)
    (live,) = known(prepared, {"mean": MeanReward()}, noise=1e-4, training=plain).run(
        "noise_ratio=10", Repetition(0, 0)
    )
    assert 0 < record.kl[-1] < 0.5 * live.kl[-1]


class CountsLetters(TextReward):
    """Calls a text as good as it has letters."""

    def __call__(self, prompts, responses):
        return torch.tensor([float(len(response)) for response in responses])


def test_a_judge_of_texts_may_say_what_is_true(prepared, monkeypatch):
    seen = []

    class Spy(language.TrainingCourse):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            seen.append(float(trainer.callback_metrics["train/gold"]))

    monkeypatch.setattr(language, "TrainingCourse", Spy)
    experiment = KnownNoise(str(prepared), {"mean": MeanReward()}, [10], training())
    ids = torch.tensor([row["example_id"] for row in experiment.prompts.prompt_rows("train")])
    worth = PromptValues(ids, torch.full((len(ids),), 7.0))
    vars(experiment)["truth"] = replace(experiment.truth, reward=None, judge=CountsLetters(), prompts=worth)
    (record,) = experiment.run("noise_ratio=10", Repetition(0, 0))
    assert record.true_return == seen
    assert len(set(seen)) == 3
    assert record.gain == pytest.approx(seen[-1] - 7)


def test_a_target_for_the_kl_moves_its_price(prepared):
    runs = [
        known(prepared, {"mean": MeanReward()}, training=training(kl_target=target)).run(
            "noise_ratio=10", Repetition(0, 0)
        )
        for target in (None, 50.0)
    ]
    assert runs[0][0].extra["kl_coef"] == pytest.approx(0.3)
    assert runs[1][0].extra["kl_coef"] < 0.25


def test_other_estimators_of_the_advantage(prepared):
    options = training(advantage=Gae(), sampling=Sampling(TOKENS))
    (record,) = known(prepared, {"mean": MeanReward()}, training=options).run("noise_ratio=10", Repetition(0, 0))
    assert np.isfinite(record.true_return).all()


def test_bad_input_is_refused(prepared):
    with pytest.raises(ValueError, match="methods: expected at least one, got none"):
        known(prepared, {})
    with pytest.raises(ValueError, match=r"expected at least 200 prompts .*, got 192"):
        known(prepared, training=training(iterations=25)).run("noise_ratio=10", Repetition(0, 0))
    longer = training(sampling=Sampling(TOKENS + 1, num_responses=2))
    with pytest.raises(ValueError, match=rf"training\.sampling: expected .*max_new_tokens={TOKENS}.*, got .*tokens=5"):
        known(prepared, training=longer).run("noise_ratio=10", Repetition(0, 0))
    with pytest.raises(ValueError, match=r"expected at least 16 prompts \(held_out\), got"):
        known(prepared, training=averaged(held_out=16)).run("noise_ratio=10", Repetition(0, 0))
    for name, value, said in (
        ("evaluations", 0, "expected some, of the averaged policy, got 0"),
        ("evaluations", 2, "expected a divisor of iterations = 3, got 2"),
        ("held_out", 12, "expected a multiple of batch_size = 8, got 12"),
    ):
        with pytest.raises(ValueError, match=rf"training\.{name}: {said}"):
            averaged(**{name: value})
    cold = training(sampling=Sampling(TOKENS, num_responses=2, temperature=0.5))
    with pytest.raises(ValueError, match=r"training\.sampling: expected .*, got .*temperature=0\.5"):
        known(prepared, training=cold).run("noise_ratio=10", Repetition(0, 0))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (known, {"noise_ratio": [10, 0]}, r"noise_ratio: expected ratios > 0, got \[10, 0\]"),
        (known, {"noise_ratio": []}, r"noise_ratio: expected a list of different values, got \[\]"),
        (known, {"members": 0}, "members: expected at least 1, got 0"),
        (known, {"kinds": 1}, "kinds: expected at least 2, noisy and quiet, got 1"),
        (known, {"noise": 0.0}, r"noise: expected a number > 0, got 0\.0"),
        (known, {"correlation": 1.0}, r"correlation: expected a number in \[0, 1\), got 1\.0"),
        (learned, {"pairs": [0]}, r"pairs: expected numbers of at least 1, got \[0\]"),
        (learned, {"flipped": [0.6]}, r"flipped: expected probabilities in \[0, 0\.5\], got \[0\.6\]"),
        (learned, {"steps": 0}, "steps: expected at least 1, got 0"),
        (learned, {"head_learning_rate": 0.0}, "head_learning_rate: expected a number > 0"),
    ],
)
def test_numbers_out_of_range_are_refused(prepared, make, options, message):
    with pytest.raises(ValueError, match=message):
        make(prepared, **options)


def test_a_baseline_that_is_no_method_is_refused_before_anything_runs(prepared):
    with pytest.raises(
        ValueError, match=r"analysis\.baselines: expected some of 'single', 'mean', 'aware', got 'bsae'"
    ):
        Study(known(prepared), "nowhere", analysis=Analysis(baselines=["mean", "bsae"]))


@pytest.mark.parametrize("name", ["known_noise", "known_noise_corrupted", "known_noise_strength", "learned_ensemble"])
def test_shipped_configs_run(name, prepared):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Study, as_group=False)
    words = [f"--config={CONFIGS / 'study' / name}.yaml", f"--experiment.init_args.prepared={prepared}"]
    small = {"iterations": 2, "batch_size": 4, "sampling.max_new_tokens": TOKENS, "update.minibatches": 1}
    words += [f"--experiment.init_args.training.{key}={value}" for key, value in small.items()]
    parsed = parser.parse_args(words)
    # What a study writes down is read again, and says the same: else it could be neither reported on nor continued.
    written = parser.dump(parsed, skip_none=False)
    assert "Unable to serialize" not in written
    given = parser.instantiate_classes(parsed)
    experiment = given.experiment
    setting = list(experiment.settings)[-1]
    records = experiment.run(setting, Repetition(0, 1))
    assert [r.method for r in records] == list(experiment.methods)
    assert set(given.analysis.baselines) <= set(experiment.methods)


def test_planted_noise_has_optima_over_the_references_responses(prepared):
    options = {"noise_ratio": [10.0], "kinds": 4, "noise": 2.0, "responses": 16}
    experiment = PlantedOptima(str(prepared), METHODS, **options)
    (setting,) = experiment.settings
    single, mean, aware = experiment.run(setting, Repetition(0, 4))
    features = experiment.features
    assert features.shape == (12, 16, 32)
    # Every response stands once, and the truth is that of its features.
    reference = TrueReward.load(prepared / "true_reward").reference
    assert sorted(features.flatten(0, 1)[:, 0].tolist()) == sorted(reference[:, 0].tolist())
    true = experiment.planted.true(features.flatten(0, 1)).view(12, 16).double()
    assert mean.reference_return == pytest.approx(float(true.mean()))
    # At β the plain optimum is the softmax of the members' mean.
    planted = known(prepared, noise=2.0, members=8).ensemble({"noise_ratio": 10.0}, 4)
    rewards = planted(features.flatten(0, 1)).mean.double()
    policy = rewards.view(12, 16).softmax(1)
    assert mean.true_return[mean.final] == pytest.approx(float((policy * true).sum(1).mean()), abs=1e-5)
    assert mean.kl[mean.final] == pytest.approx(float((policy * (policy * 16).log()).sum(1).mean()), abs=1e-5)
    assert len({tuple(r.true_return) for r in (single, mean, aware)}) == 3
    again = PlantedOptima(str(prepared), METHODS, **options).run_block(setting, [Repetition(1, 5), Repetition(0, 4)])
    assert again[3:] == [single, mean, aware]
    with pytest.raises(ValueError, match="responses: expected at least 2, got 1"):
        PlantedOptima(str(prepared), METHODS, **options | {"responses": 1})


def test_one_of_a_reward_and_a_judge_knows_the_truth(tmp_path):
    spec = FeatureSpec(Pretrained("nowhere"))
    reward = TrueReward(torch.ones(2), torch.zeros(()), torch.zeros(3, 2))
    for known in ({}, {"reward": reward, "judge": len}):
        with pytest.raises(ValueError, match="truth: expected a reward or a judge, got "):
            Truth(spec, tmp_path / "prompts.jsonl", torch.zeros(3, 2), **known)
