"""Nothing that is read runs code: a folder or a checkpoint may name what it likes, and none of it is imported."""

import json
import sys

import pytest
import torch
from hostile_helpers import EVIL, HEAD, checkpoint, edit, ensemble, refused

from lit_vapo.cli import main
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.settings import MOST_SETTINGS
from lit_vapo.models.trust import check_trusted
from lit_vapo.rewards import load_reward
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.stages.ppo.module import PPOModule


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module in the working directory that leaves a mark when it is imported."""
    (tmp_path / "trap.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()
    assert "trap" not in sys.modules


OTHERS = [
    "trap.Evil",
    "os.system",
    "lit_vapo.__main__.main",
    "lit_vapo._trap.Evil",
    "lit_vapo.trap.Evil",
    "lit_vapo..trap.Evil",
    "lit_vapo.rewards.reward_model.importlib.import_module",
    "lit_vapo.rewards.reward_model/../../trap.Evil",
    "lit_vapo_trap.models.Evil",
    "HeadEnsemble",
    "",
    None,
    7,
]


@pytest.mark.parametrize("class_path", OTHERS)
def test_a_class_of_somebody_else_is_refused_wherever_it_stands(class_path):
    for settings in ({"class_path": class_path}, {"a": [{"b": {"init_args": {"c": ({"class_path": class_path},)}}}]}):
        refused(
            "a folder: expected classes of lit_vapo, got class_path", check_trusted, settings, ["trapdoor"], "a folder"
        )


def test_own_classes_and_trusted_ones_pass():
    settings = {"head": {"class_path": HEAD}, "other": {"class_path": "mine.heads.Head"}}
    for trust in (["mine"], ["mine.heads"], ["mine.heads.Head"]):
        check_trusted(settings, trust, "a folder")
    for trust in (None, [], ["min"], ["mine.head"], ["heads"], [""]):
        refused("class_path 'mine.heads.Head'", check_trusted, settings, trust, "a folder")


@pytest.mark.parametrize("value", [True, 1, "yes", [0]])
def test_remote_code_is_refused_by_name(value, tmp_path, monkeypatch):
    settings = {"spec": {"base": {"path": "org/model", "trust_remote_code": value}}}
    message = refused("expected models without code of their own", check_trusted, settings, ["org/other"], "a folder")
    assert "trust=['org/model']" in message
    check_trusted(settings, ["org/model"], "a folder")
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    check_trusted(settings, [str(tmp_path / "org" / "model")], "a folder")


def test_settings_without_end_are_refused():
    doubled, deep = [], {}
    for _ in range(60):
        doubled = [doubled, doubled]
    for _ in range(10_000):
        deep = {"a": deep}
    for settings in (doubled, deep, [0] * (MOST_SETTINGS + 1)):
        refused("a folder: expected at most .* settings", check_trusted, settings, None, "a folder")


def test_an_ensemble_imports_nothing(tiny_model_dir, trap, tmp_path):
    folder = ensemble(tmp_path / "e", tiny_model_dir)
    edit(folder / "ensemble.json", head__class_path="trap.Evil")
    for call in (
        lambda: RewardModel.from_pretrained(folder),
        lambda: PPOModule(Pretrained(tiny_model_dir), str(folder)),
        lambda: load_reward(str(folder)),
    ):
        message = refused("ensemble.json: expected classes of lit_vapo, got class_path 'trap.Evil'", call)
        assert "trust=['trap.Evil']" in message


def test_an_ensemble_does_not_trust_a_base(tiny_model_dir, trap, tmp_path):
    folder = ensemble(tmp_path / "e", tiny_model_dir)
    edit(folder / "ensemble.json", spec__base__trust_remote_code=True)
    refused("expected models without code of their own, got trust_remote_code", RewardModel.from_pretrained, folder)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("reward", {"head": {"class_path": "trap.Evil", "init_args": {}}}),
        ("reward", {"reference": {"path": "x", "trust_remote_code": True}}),
        ("sft", {"base": {"path": "x", "trust_remote_code": True}}),
        ("ppo", {"objective": {"class_path": "trap.Evil"}}),
        ("ppo", {"advantage": {"class_path": "trap.Evil"}, "trust": ["trap"]}),
        ("ppo", {"critic": {"base": {"path": "x", "trust_remote_code": True}}}),
    ],
)
def test_a_checkpoint_imports_nothing(tiny_model_dir, trap, tmp_path, stage, settings):
    given = {"base": {"path": tiny_model_dir}, **({"reward": "nowhere"} if stage == "ppo" else {}), **settings}
    path = checkpoint(tmp_path / "x.ckpt", stage, **given)
    refused("x.ckpt: expected (classes of lit_vapo|models without)", main, export(path, tmp_path))
    assert not (tmp_path / "out").exists()


def export(path, folder, *options):
    return ["export", f"--checkpoint={path}", f"--output={folder / 'out'}", *options]


@pytest.mark.parametrize("given", ["head.yaml", "{class_path: trap.Evil}", "trap.Evil", ["trap.Evil"], 3, {"a": 1}])
def test_a_setting_is_no_way_to_another_file(tiny_model_dir, trap, tmp_path, given):
    (tmp_path / "head.yaml").write_text("class_path: trap.Evil\n")
    path = checkpoint(tmp_path / "x.ckpt", base={"path": tiny_model_dir}, head=given)
    refused("x.ckpt: head", main, export(path, tmp_path))


@pytest.mark.parametrize("key", ["hparams", "module_arguments", "hparams_name", "hparams_type"])
def test_old_names_of_hyperparameters_are_not_read(tiny_model_dir, trap, tmp_path, key):
    path = checkpoint(
        tmp_path / "x.ckpt", base={"path": tiny_model_dir}, head={"class_path": HEAD, "init_args": {"num_members": 2}}
    )
    contents = torch.load(path, weights_only=True)
    torch.save({**contents, key: {"head": {"class_path": "trap.Evil"}}}, path)
    main(export(path, tmp_path))
    saved = json.loads((tmp_path / "out" / "ensemble.json").read_text())
    assert saved["head"]["class_path"] == HEAD


def test_what_the_user_names_runs(tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "friend.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = checkpoint(
        tmp_path / "x.ckpt",
        base={"path": tiny_model_dir},
        head={"class_path": "friend.Evil", "init_args": {"num_members": 2}},
    )
    main(export(path, tmp_path, "--trust=[friend.Evil]"))
    assert (tmp_path / "marker").exists()
