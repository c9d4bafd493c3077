"""How the PPO stage evaluates: the same prompts for policy and reference, the same figures again, and its files."""

import csv
import json
import math
import statistics
from types import SimpleNamespace

import ppo_helpers
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from ppo_helpers import ppo_module, prompt_data

from lit_vapo.evaluation.policy_files import read_evaluations
from lit_vapo.models.generation import Sampling
from lit_vapo.stages.ppo.update import UpdateSettings
from lit_vapo.types import TextReward


class Judge(TextReward):
    """Counts the letters of a response."""

    def __call__(self, prompts, responses):
        return torch.tensor([float(len(r)) for r in responses])


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("ppo") / "ensemble", tiny_model_dir)


@pytest.fixture
def data(tiny_model_dir, tmp_path):
    """Ten held-out prompts in three batches of unequal size, six to train on."""
    return prompt_data(tiny_model_dir, tmp_path, validation_fraction=0.5)


def columns(path):
    return {(row["policy"], int(row["iteration"])): row for row in csv.DictReader(path.read_text().splitlines())}


@pytest.fixture(scope="module")
def fitted(tiny_model_dir, reward, tmp_path_factory):
    """A run of two iterations with a validation after each, its metrics, and how often each role answered."""
    folder = tmp_path_factory.mktemp("fit")
    module = ppo_module(tiny_model_dir, reward, gold=Judge())
    asked, logged = [], []

    class Watch(Callback):
        def on_validation_end(self, trainer, pl_module):
            values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            logged.append((values, pl_module.samples))

    start = module.start

    def watched():
        start()
        make = module.maker.make
        module.maker.make = lambda batch, objective, role="actor", values=True, **kwargs: (
            asked.append((role, values)) or make(batch, objective, role, values, **kwargs)
        )

    module.start = watched
    data = prompt_data(tiny_model_dir, folder, validation_fraction=0.5, batch_size=3)
    trainer = ppo_helpers.trainer(folder, max_epochs=2, limit_train_batches=1, callbacks=[Watch()])
    torch.manual_seed(0)
    trainer.fit(module, data)
    return SimpleNamespace(folder=folder, asked=asked, logged=logged, module=module, data=data)


def test_the_reference_answers_each_prompt_once(fitted):
    evaluated = [role for role, values in fitted.asked if not values]
    # Ten prompts in batches of three: four batches, in two evaluations.
    assert evaluated == ["reference", "actor"] * 4 + ["actor"] * 4


def test_every_evaluation_compares_with_the_reference(fitted):
    assert len(fitted.logged) == 2
    reference = fitted.module.metrics["reference"].compute()
    theirs = {r["prompt_id"]: r for r in reference}
    assert len(theirs) == 10
    for logged, samples in fitted.logged:
        assert [r["prompt_id"] for r in samples] == [r["example_id"] for r in fitted.data.prompt_rows("val")]
        for name, key in (("gold", "win_rate"), ("reward", "reward_win_rate")):
            differences = [r[name] - theirs[r["prompt_id"]][name] for r in samples]
            wins = [0.5 * ((d > 0) - (d < 0) + 1) for d in differences]
            assert logged[f"val/{key}"] == pytest.approx(statistics.mean(wins))
            assert logged[f"val/{name}_gain"] == pytest.approx(statistics.mean(differences), abs=1e-5)
        # A mean over ten rows, not over batches of three, three, three and one.
        assert logged["val/gold"] == pytest.approx(statistics.mean(len(r["response"]) for r in samples))
        assert logged["val/response_length"] == pytest.approx(statistics.mean(r["length"] for r in samples))
    assert fitted.logged[0][0]["val/kl_k1"] != fitted.logged[1][0]["val/kl_k1"]


def test_the_course_of_a_run_is_written(fitted):
    rows = columns(fitted.folder / "evaluations.csv")
    assert list(rows) == [("reference", 0), ("policy", 1), ("policy", 2)]
    assert float(rows["reference", 0]["kl_k1"]) == 0
    assert rows["reference", 0]["win_rate"] == ""
    for iteration, (logged, _) in enumerate(fitted.logged, start=1):
        row = rows["policy", iteration]
        assert int(row["step"]) == 4 * iteration
        for name, value in logged.items():
            assert float(row[name.removeprefix("val/")]) == pytest.approx(value, rel=1e-5), name
        gain = float(row["gold"]) - float(rows["reference", 0]["gold"])
        assert float(row["gold_gain"]) == pytest.approx(gain, abs=1e-4)
    assert (fitted.folder / "overoptimisation.png").is_file()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_goes_on_with_its_evaluations(tiny_model_dir, reward, data, tmp_path):
    options = {"limit_train_batches": 1, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    path = tmp_path / "run" / "evaluations.csv"
    at_start = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            at_start.append(path.exists())

    def fit(epochs, ckpt_path=None):
        keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        kwargs = {"max_epochs": epochs, "callbacks": [keep, Look()], "enable_checkpointing": True, **options}
        trainer = ppo_helpers.trainer(tmp_path / "run", **kwargs)
        torch.manual_seed(0)
        trainer.fit(ppo_module(tiny_model_dir, reward), data, ckpt_path=ckpt_path, weights_only=True)
        return read_evaluations(path)

    first = fit(3)
    # A sanity check is no evaluation.
    assert at_start == [False]
    assert [r["iteration"] for r in first] == [0, 1, 2, 3]
    # From the first of three, to the second: what came after it is another branch's.
    resumed = fit(2, tmp_path / "ckpt" / "epoch=0.ckpt")
    assert [r["iteration"] for r in resumed] == [0, 1, 2]
    assert [str(r) for r in resumed[:2]] == [str(r) for r in first[:2]]
    # A run from the start knows nothing of what another left in its folder.
    assert [r["iteration"] for r in fit(1)] == [0, 1]


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_the_same_figures_again(tiny_model_dir, reward, data, tmp_path, verb):
    module = ppo_module(tiny_model_dir, reward, gold=Judge())
    found, texts = [], []
    for seed, settings in ((1, UpdateSettings()), (2, UpdateSettings(minibatches=1, micro_batch_tokens=9))):
        torch.manual_seed(seed)
        module.update = settings
        found += getattr(ppo_helpers.trainer(tmp_path), verb)(module, data, verbose=False)
        texts.append([r["response"] for r in module.samples])
    fresh = ppo_module(tiny_model_dir, reward, gold=Judge())
    found += getattr(ppo_helpers.trainer(tmp_path), verb)(fresh, data, verbose=False)
    assert found[0] == found[1] == found[2]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    other = ppo_module(tiny_model_dir, reward, gold=Judge(), seed=1)
    assert getattr(ppo_helpers.trainer(tmp_path), verb)(other, data, verbose=False) != found[:1]


def test_the_random_numbers_of_training_stay_as_they_were(tiny_model_dir, reward, data, tmp_path):
    module = ppo_module(tiny_model_dir, reward)
    ppo_helpers.trainer(tmp_path).validate(module, data, verbose=False)
    batch = next(iter(data.val_dataloader()))
    before = torch.get_rng_state()
    module.validation_step(batch, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_an_untrained_policy_answers_as_the_reference_does(tiny_model_dir, reward, data, tmp_path):
    module = ppo_module(tiny_model_dir, reward, gold=Judge())
    (result,) = ppo_helpers.trainer(tmp_path).test(module, data, verbose=False)
    assert result["test/kl_k3"] == pytest.approx(0, abs=1e-6)
    assert result["test/win_rate"] == result["test/reward_win_rate"] == 0.5
    assert result["test/gold_gain"] == 0
    for name, value in result.items():
        if name.startswith("test_reference/"):
            assert result[name.replace("_reference", "")] == pytest.approx(value, abs=1e-4), name
    expected = [(r["prompt"], who) for r in data.prompt_rows("test") for who in ("reference", "policy")]
    assert [(record["prompt"], record["policy"]) for record in module.samples] == expected


def test_a_test_says_how_far_its_weights_had_come(tiny_model_dir, reward, data, tmp_path):
    def found():
        trainer.test(module, data, verbose=False)
        return json.loads((tmp_path / "test" / "evaluation.json").read_text())["step"]

    module = ppo_module(tiny_model_dir, reward)
    trainer = ppo_helpers.trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    assert found() is None
    trainer.fit(module, datamodule=data)
    assert found() == trainer.global_step > 0


def test_a_test_with_several_responses_writes_best_of_n(tiny_model_dir, reward, data, tmp_path):
    module = ppo_module(tiny_model_dir, reward, gold=Judge(), sampling=Sampling(6, num_responses=3))
    (result,) = ppo_helpers.trainer(tmp_path).test(module, data, verbose=False)
    record = json.loads((tmp_path / "test" / "evaluation.json").read_text())
    assert (record["num_prompts"], record["num_responses"]) == (10, 3)
    for who, prefix in (("policy", "test"), ("reference", "test_reference")):
        for name, value in record[who].items():
            assert result[f"{prefix}/{name}"] == pytest.approx(value, rel=1e-5), name
        curves = record["best_of_n"][who]
        assert curves["n"] == [1, 2, 3]
        assert curves["gold"][0] == pytest.approx(record[who]["gold"])
        assert curves["reward"] == sorted(curves["reward"])
        rows = [r for r in module.samples if r["policy"] == who]
        best = [max(rows[i : i + 3], key=lambda r: r["reward"])["reward"] for i in range(0, 30, 3)]
        assert result[f"{prefix}/best_of_n_reward"] == pytest.approx(statistics.mean(best), rel=1e-5)
        assert [r["response_number"] for r in rows] == [0, 1, 2] * 10
    assert record["comparison"]["win_rate"] == result["test/win_rate"]
    assert (tmp_path / "test" / "overoptimisation.png").is_file()


def test_prediction_returns_scored_texts(tiny_model_dir, reward, data, tmp_path):
    module = ppo_module(tiny_model_dir, reward)
    batches = ppo_helpers.trainer(tmp_path).predict(module, data)
    records = [record for batch in batches for record in batch]
    assert [r["prompt"] for r in records] == [r["prompt"] for r in data.predict_rows()]
    assert {"prompt", "response", "members", "sigma", "kl"} <= set(records[0])
    assert module.samples == records
    assert all(math.isfinite(r["kl"]) for r in records)
