"""Folders, checkpoints and options that the version before `rewards/` wrote are read, and mean the same."""

import importlib
import json
import shutil

import pytest
import torch
import yaml
from helpers import last
from safetensors.torch import load_file, save_file

from lit_vapo.cli import main
from lit_vapo.models.digests import seal
from lit_vapo.models.older import MOVED, renamed
from lit_vapo.rewards.reward_model import RewardModel

HEADS = {
    "lit_vapo.uncertainty.bayesian_linear.BayesianLinear",
    "lit_vapo.uncertainty.full_ensemble.FullEnsemble",
    "lit_vapo.uncertainty.head_ensemble.HeadEnsemble",
    "lit_vapo.uncertainty.lora_ensemble.LoraEnsemble",
    "lit_vapo.uncertainty.mc_dropout.McDropout",
}
OTHERS = {
    "lit_vapo.uncertainty.base.RewardHead",
    "lit_vapo.study.known_noise.KnownNoise",
    "lit_vapo.study.language.LanguageModelStudy",
    "lit_vapo.study.learned_ensemble.LearnedEnsemble",
    "lit_vapo.study.planted_optima.PlantedOptima",
    "lit_vapo.study.response_optima.ResponseOptima",
    "lit_vapo.study.tabular.Optima",
    "lit_vapo.study.told.Told",
    "lit_vapo.study.variance.Shuffled",
}


def test_every_class_that_has_moved_is_where_the_table_says():
    assert {path.rpartition(".")[0] for path in HEADS | OTHERS} == set(MOVED)
    for path in HEADS | OTHERS:
        module, _, name = renamed(path).rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    head = "lit_vapo.uncertainty.head_ensemble.HeadEnsemble"
    found = renamed({"a": [{"class_path": head}, 1], "b": None, "c": "lit_vapo"})
    assert found["a"] == [{"class_path": "lit_vapo.rewards.members.heads.HeadEnsemble"}, 1]
    assert (found["b"], found["c"]) == (None, "lit_vapo")


def without_moderation(state):
    """A state as it was when variances stayed as they came."""
    found = {k: v for k, v in state.items() if not k.endswith(("shrinkage", "typical_variance"))}
    assert len(found) == len(state) - 2
    return found


@pytest.fixture
def older(tiny_ensemble_dir, reward_run, ppo_run, tmp_path):
    """An ensemble and two runs as the version before wrote them."""
    for name, source in (("ensemble", tiny_ensemble_dir), ("reward", reward_run), ("ppo", ppo_run)):
        shutil.copytree(source, tmp_path / name)
    path = tmp_path / "ensemble" / "ensemble.json"
    said = json.loads(path.read_text())
    said["head"]["class_path"] = "lit_vapo.uncertainty.head_ensemble.HeadEnsemble"
    path.write_text(json.dumps(said))
    weights = without_moderation(load_file(tmp_path / "ensemble" / "head.safetensors"))
    save_file(weights, tmp_path / "ensemble" / "head.safetensors")
    seal(tmp_path / "ensemble")
    checkpoint = torch.load(last(tmp_path / "reward"), weights_only=True)
    checkpoint["hyper_parameters"]["head"]["class_path"] = "lit_vapo.uncertainty.head_ensemble.HeadEnsemble"
    checkpoint["state_dict"] = without_moderation(checkpoint["state_dict"])
    torch.save(checkpoint, last(tmp_path / "reward"))
    checkpoint = torch.load(last(tmp_path / "ppo"), weights_only=True)
    state = {"kl_coef": checkpoint["state_dict"].pop("kl.coef"), "objective.reference_variance": torch.ones(())}
    for key, value in without_moderation(checkpoint["state_dict"]).items():
        state[key.replace("reward.model.", "networks.reward_model.")] = value
    assert "networks.reward_model.head.weight" in state
    checkpoint["state_dict"] = state
    # Nothing was noted of what a run reads.
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, last(tmp_path / "ppo"))
    return tmp_path


def test_an_older_ensemble_scores_equally(older, tiny_ensemble_dir):
    ids, lengths, prompts = torch.arange(5, 17).view(2, 6), torch.tensor([6, 5]), torch.tensor([2, 2])
    then, now = (RewardModel.from_pretrained(x)(ids, lengths, prompts) for x in (older / "ensemble", tiny_ensemble_dir))
    assert torch.equal(then.members, now.members)
    # Its variances are as they come, until it is calibrated anew.
    torch.testing.assert_close(then.variance, now.members.var(1))


@pytest.mark.parametrize(("stage", "file"), [("reward", "head.safetensors"), ("ppo", "adapter_model.safetensors")])
def test_an_older_checkpoint_exports_the_same(older, reward_run, ppo_run, stage, file):
    run = {"reward": reward_run, "ppo": ppo_run}[stage]
    main(["export", f"--checkpoint={last(older / stage)}", f"--output={older / 'then'}"])
    main(["export", f"--checkpoint={last(run)}", f"--output={older / 'now'}"])
    then, now = (load_file(older / when / file) for when in ("then", "now"))
    assert then.keys() == now.keys()
    unknown = {"shrinkage": 0.0, "typical_variance": 1.0}
    for name, weight in now.items():
        assert torch.equal(then[name], torch.tensor(unknown[name]) if name in unknown else weight), name


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_an_older_ppo_run_goes_on(older, stage_args):
    options = {"ckpt_path": last(older / "ppo"), "trainer__max_steps": 8, "trainer__max_epochs": 4}
    main(stage_args("ppo", "fit", older / "ppo", model__reward=older / "ensemble", **options))
    state = torch.load(last(older / "ppo"), weights_only=True)["state_dict"]
    assert "kl.coef" in state
    assert not [name for name in state if name.startswith(("kl_coef", "networks.reward_model", "objective."))]


def test_older_options_are_read(stage_args, tmp_path, capsys):
    said = {"model": {"head": {"class_path": "lit_vapo.uncertainty.head_ensemble.HeadEnsemble"}}}
    (tmp_path / "older.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(SystemExit):
        main([*stage_args("reward", "fit", tmp_path / "run"), f"--config={tmp_path / 'older.yaml'}", "--print_config"])
    head = yaml.safe_load(capsys.readouterr().out)["model"]["head"]["class_path"]
    assert head == "lit_vapo.rewards.members.heads.HeadEnsemble"


STUDY = """
output: {output}
repetitions: 2
experiment:
  class_path: lit_vapo.study.experiments.tabular.Optima
  init_args:
    noise_ratio: [10]
    members: [3]
    correlation: [0]
    kl_coef: [4]
    methods:
      mean:
        objective: MeanReward
"""


def test_an_older_study_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_vapo.study.report._draw", lambda *_: {})
    (tmp_path / "study.yaml").write_text(STUDY.format(output=tmp_path / "study"))
    main(["study", "run", f"--config={tmp_path / 'study.yaml'}"])
    path = tmp_path / "study" / "study.json"
    text = path.read_text()
    assert "lit_vapo.objectives.MeanReward" in text
    text = text.replace("lit_vapo.objectives.MeanReward", "lit_vapo.objectives.mean_reward.MeanReward")
    path.write_text(text.replace("lit_vapo.study.experiments.tabular", "lit_vapo.study.tabular"))
    main(["study", "report", f"--config={tmp_path / 'study.yaml'}"])
    with pytest.raises(ValueError, match="another configuration; .* these values: seed: 0 there, 1 here$"):
        main(["study", "report", f"--config={tmp_path / 'study.yaml'}", "--seed=1"])
