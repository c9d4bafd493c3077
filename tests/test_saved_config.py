"""The configuration that a run saves: what options left to the module is told as the module has chosen it."""

from dataclasses import asdict

import pytest
import yaml
from test_configs import CLASSES, Built

from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.settings import plain


def saved(folder):
    (file,) = folder.glob("logs/version_0/config.yaml")
    return file, yaml.safe_load(file.read_text())["model"]


def test_a_run_tells_what_was_left_to_it(ppo_run, reward_run):
    model = saved(ppo_run)[1]
    assert model["objective"]["class_path"].endswith(".VarianceAware")
    assert model["objective"]["init_args"]["max_weight"] == 10.0
    assert model["advantage"]["init_args"] == {"gamma": 1.0, "gae_lambda": 0.95, "whiten": True}
    assert model["generator"]["class_path"].endswith(".TransformersGenerator")
    assert model["critic"] == asdict(CriticSpec())
    model = saved(reward_run)[1]
    assert set(model["reference_sampling"]) == set(asdict(Sampling()))


def test_what_means_none_stays_so(ppo_run):
    model = saved(ppo_run)[1]
    assert [model[name] for name in ("policy", "kl_target", "ema_decay", "gold", "alarm")] == [None] * 5


@pytest.mark.parametrize("stage", ["ppo", "reward"])
def test_a_run_is_made_of_it_again(stage, ppo_run, reward_run, tmp_path):
    folder = {"ppo": ppo_run, "reward": reward_run}[stage]
    file, model = saved(folder)
    words = ["fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    made = Built(*CLASSES[stage], stage=stage, args=words)
    again = yaml.safe_load(made.parser.dump(made.config, skip_none=False))["fit"]["model"]
    assert again == model


def test_a_run_goes_on_from_what_it_chose_without_a_word(tiny_model_dir, tiny_ensemble_dir, caplog):
    module = PPOModule(Pretrained(tiny_model_dir), str(tiny_ensemble_dir))
    assert module.hparams["objective"] is None
    # An earlier version kept what was given, and this one what was made of it.
    for objective in (None, plain(VarianceAware())):
        module._tell_differences({"hyper_parameters": {"objective": objective}})
    assert not caplog.text
    module._tell_differences({"hyper_parameters": {"objective": plain(VarianceAware(max_weight=2.0))}})
    assert "model.objective was" in caplog.text
