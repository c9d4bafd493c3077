"""The alarm in a PPO run: what it learns from, what it logs, when it ends a run, and that checkpoints hold it."""

import csv

import helpers
import ppo_helpers
import pytest
import torch
from lightning.pytorch import Callback
from ppo_helpers import fit_ppo, ppo_module, prompt_data, state

from lit_vapo.callbacks.checkpoint import RunCheckpoint
from lit_vapo.cli import main
from lit_vapo.functional import fit_spread, squared_distance
from lit_vapo.rewards import FunctionReward, WeightedSum
from lit_vapo.stages.ppo.alarm import Alarm, AlarmSettings
from lit_vapo.types import RewardEstimate

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def said(rows=64, width=6, seed=0, shift=0.0, sigma=1.0, features=True):
    """What a source of rewards might say."""
    read = draw(rows, width, seed=seed) + shift if features else None
    return RewardEstimate(torch.zeros(rows), torch.full((rows,), sigma**2), None, features=read)


def fitted(**settings):
    alarm = Alarm(AlarmSettings(**settings))
    alarm.fit([said(seed=0), said(seed=1)])
    return alarm


def alone(x):
    return x


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("alarm") / "ensemble", tiny_model_dir)


# 1. By itself.


def test_marks_are_distances_in_units_of_the_bound_and_sigma_in_that_of_the_reference():
    alarm = fitted()
    rows = torch.cat([said(seed=0).features, said(seed=1).features])
    marks = alarm.marks(said(rows=9, seed=2, shift=1.0, sigma=3.0))
    expected = squared_distance(said(rows=9, seed=2, shift=1.0).features, fit_spread(rows)) / alarm.bound
    torch.testing.assert_close(marks["distance"], expected.float())
    torch.testing.assert_close(marks["relative_sigma"], torch.full((9,), 3.0))


def test_what_is_not_there_is_not_marked():
    alarm = Alarm(AlarmSettings())
    alarm.fit([said(features=False)])
    assert alarm.marks(said(features=False)).keys() == {"relative_sigma"}
    alarm.fit([said(sigma=0.0)])
    assert alarm.marks(said(sigma=0.0)).keys() == {"distance"}


def test_it_rings_after_so_many_iterations_in_a_row(caplog):
    alarm = fitted(stop_share=0.5, patience=2)
    far, near = alarm.marks(said(shift=9.0)), alarm.marks(said(seed=3))
    heard = [alarm.rings(marks, alone, i) for i, marks in enumerate((far, near, far, far, far), start=1)]
    assert heard == [False, False, False, True, True]
    expected = "iteration 4: the share of responses that are unlike the reference's is 1, above 0.5, for 2 iterations"
    assert expected in caplog.text


def test_it_rings_for_sigma_and_never_without_a_limit():
    alarm = fitted(stop_sigma=2.0, patience=1)
    assert not alarm.rings(alarm.marks(said(sigma=1.9)), alone, 1)
    assert alarm.rings(alarm.marks(said(sigma=2.1)), alone, 2)
    assert not fitted(patience=1).rings(alarm.marks(said(sigma=99.0, shift=9.0)), alone, 1)


def test_two_processes_ring_together():
    # One has seen nothing but outliers, the other none: half of all.
    alarm = fitted(stop_share=0.6, patience=1)
    far = alarm.marks(said(shift=9.0))
    assert alarm.rings(far, alone, 1)
    sums = iter([64.0, 128.0])
    assert not alarm.rings(far, lambda x: torch.tensor(next(sums)), 1)


def test_a_round_trip_of_its_state():
    one, other = fitted(stop_share=0.5), Alarm(AlarmSettings())
    one.rings(one.marks(said(shift=9.0)), alone, 1)
    other.make_room({name: x.shape for name, x in one.state_dict().items()})
    other.load_state_dict(one.state_dict())
    assert int(other.ringing) == 1
    torch.testing.assert_close(one.marks(said(seed=5)), other.marks(said(seed=5)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlarmSettings(level=0.0), "model.alarm.level: expected a number between 0 and 1, got 0.0"),
        (lambda: AlarmSettings(patience=0), "model.alarm.patience: expected at least 1, got 0"),
        (lambda: AlarmSettings(stop_share=0.01), "model.alarm.stop_share: expected more than level = 0.01, got 0.01"),
        (
            lambda: Alarm(AlarmSettings(stop_share=0.5)).fit([said(features=False)]),
            "model.alarm.stop_share: expected a source of rewards with features .* got one without",
        ),
        (
            lambda: Alarm(AlarmSettings()).fit([said(features=False, sigma=0.0)]),
            "model.alarm: expected a source .* got one without, and without a variance",
        ),
        (
            lambda: Alarm(AlarmSettings(stop_sigma=2.0)).fit([said(sigma=0.0)]),
            "model.alarm.stop_sigma: expected members that disagree on the reference, got σ = 0",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# 2. In a run.


def test_a_run_logs_it_and_learns_as_without_it(tiny_model_dir, reward, tmp_path):
    runs = {}
    for alarm in (None, AlarmSettings()):
        module = ppo_module(tiny_model_dir, reward, alarm=alarm, num_reference=12)
        rows = fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=3)
        runs[alarm is None] = rows, state(module)
    for name, value in runs[True][1].items():
        assert torch.equal(runs[False][1][name], value), name
    keys = {"train/outlier_distance", "train/outlier_share", "train/relative_sigma"}
    assert runs[False][0][0].keys() - runs[True][0][0].keys() == keys
    for row in runs[False][0]:
        assert row["train/outlier_distance"] > 0
        assert 0 <= row["train/outlier_share"] <= 1
        assert row["train/relative_sigma"] == pytest.approx(row["train/ensemble_sigma"] / float(module.alarm.sigma))


def test_it_costs_no_pass_of_any_model(tiny_model_dir, reward, tmp_path):
    counts = []
    for alarm in (None, AlarmSettings()):
        module = ppo_module(tiny_model_dir, reward, alarm=alarm, num_reference=12)
        meet, passes = module.meet_reference, []

        def met(data, module=module, meet=meet, passes=passes):
            meet(data)
            # From here on: the reference's responses are sampled and scored once, before training.
            module.networks.policy.causal_lm.register_forward_hook(lambda *args: passes.append(1))

        module.meet_reference = met
        fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=2)
        counts.append(len(passes))
    assert counts[0] == counts[1] > 0


def test_members_with_a_backbone_of_their_own_are_watched_too(tiny_model_dir, tmp_path):
    adapters = ppo_helpers.saved_ensemble(tmp_path / "adapters", tiny_model_dir)
    module = ppo_module(tiny_model_dir, adapters, alarm=AlarmSettings(), num_reference=12)
    rows = fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=1)
    assert rows[0]["train/outlier_distance"] > 0
    assert module.alarm.mean.shape == (32,)


def test_a_sum_is_watched_by_the_first_that_has_features_and_a_function_by_nothing(tiny_model_dir, reward, tmp_path):
    length = FunctionReward("reward_functions:length")
    both = WeightedSum({"length": length, "ensemble": reward})
    module = ppo_module(tiny_model_dir, both, alarm=AlarmSettings(), num_reference=12)
    assert (
        "train/outlier_share"
        in fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=1)[0]
    )


def test_evaluations_have_it_of_policy_and_reference(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward, alarm=AlarmSettings(level=0.1), num_reference=16)
    data = prompt_data(tiny_model_dir, tmp_path, count=40, validation_fraction=0.5)
    fit_ppo(module, data, tmp_path, limit_train_batches=1, limit_val_batches=5)
    reference, policy = csv.DictReader((tmp_path / "evaluations.csv").read_text().splitlines())
    assert (reference["policy"], policy["policy"]) == ("reference", "policy")
    for row in (reference, policy):
        assert float(row["outlier_distance"]) > 0
    # The false alarms of this run, on held-out prompts.
    assert float(reference["outlier_share"]) <= 0.4
    records = [r for r in module.metrics["reference"].compute()]
    assert {"distance", "relative_sigma"} <= records[0].keys()


def test_it_ends_a_run_without_learning_from_the_last_iteration(tiny_model_dir, reward, tmp_path, caplog):
    # Members disagree more than nearly not at all: at once, and twice is enough.
    alarm = AlarmSettings(stop_sigma=0.01, patience=2)
    module = ppo_module(tiny_model_dir, reward, alarm=alarm, num_reference=12)
    rows = fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path)
    assert [row["train/updates"] for row in rows] == [4, 0]
    assert "iteration 2: the members' disagreement" in caplog.text


def checkpointed(folder):
    return {"callbacks": [RunCheckpoint(folder, every_iterations=1)], "enable_checkpointing": True}


class Keep(Callback):
    """Saves after each iteration."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{batch_idx + 1}.ckpt")


def test_a_resumed_run_rings_when_the_run_would_have(tiny_model_dir, reward, tmp_path):
    def module():
        alarm = AlarmSettings(stop_sigma=0.01, patience=3)
        return ppo_module(tiny_model_dir, reward, alarm=alarm, num_reference=12)

    data = prompt_data(tiny_model_dir, tmp_path)
    whole = fit_ppo(module(), data, tmp_path, callbacks=[Keep()])
    assert [row["train/updates"] for row in whole] == [4, 4, 0]
    again = module()
    again.alarm.fit = None  # nobody may ask the reference again
    (rest,) = fit_ppo(again, data, tmp_path, tmp_path / "2.ckpt")
    # What the whole run logs of this iteration, besides figures of the updates before it.
    rest = {name: value for name, value in rest.items() if not name.endswith("per_second")}
    assert rest == {name: whole[2][name] for name in rest}
    assert rest["train/updates"] == 0


def test_checkpoints_with_and_without_an_alarm_may_be_exchanged(tiny_model_dir, reward, tmp_path):
    data = prompt_data(tiny_model_dir, tmp_path)
    options = {"limit_train_batches": 1}
    for then, now in ((AlarmSettings(), None), (None, AlarmSettings())):
        folder = tmp_path / str(then is None)
        module = ppo_module(tiny_model_dir, reward, alarm=then, num_reference=12)
        fit_ppo(module, data, folder, **options, **checkpointed(folder / "ckpt"))
        again = ppo_module(tiny_model_dir, reward, alarm=now, num_reference=12)
        more = {"max_epochs": 2, "limit_train_batches": 1, **checkpointed(folder / "again")}
        rows = fit_ppo(again, data, folder, folder / "ckpt" / "last.ckpt", **more)
        assert ("train/outlier_share" in rows[-1]) == (now is not None)


def test_an_alarm_of_another_reward_is_fitted_anew(tiny_model_dir, reward, tmp_path):
    data = prompt_data(tiny_model_dir, tmp_path)
    module = ppo_module(tiny_model_dir, reward, alarm=AlarmSettings(), num_reference=12)
    fit_ppo(module, data, tmp_path, limit_train_batches=1, **checkpointed(tmp_path / "ckpt"))
    other = ppo_helpers.ensemble(tmp_path / "other", tiny_model_dir, pooling="mean")
    again = ppo_module(tiny_model_dir, other, alarm=AlarmSettings(), num_reference=12)
    more = {"max_epochs": 2, "limit_train_batches": 1, **checkpointed(tmp_path / "again")}
    fit_ppo(again, data, tmp_path, tmp_path / "ckpt" / "last.ckpt", **more)
    assert not torch.equal(again.alarm.mean, module.alarm.mean)


def test_the_command_line_takes_it_and_exports_what_it_saved(stage_args, tiny_ensemble_dir, tmp_path):
    options = ["--model.alarm.level=0.05", "--model.alarm.stop_share=0.9", "--model.num_reference=12"]
    main(stage_args("ppo", "fit", tmp_path / "run", *options, model__reward=tiny_ensemble_dir))
    held = torch.load(helpers.last(tmp_path / "run"), weights_only=True)
    assert held["hyper_parameters"]["alarm"] == {"level": 0.05, "stop_share": 0.9, "stop_sigma": None, "patience": 3}
    assert "alarm.directions" in held["state_dict"]
    main(["export", f"--checkpoint={helpers.last(tmp_path / 'run')}", f"--output={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "README.md").is_file()
