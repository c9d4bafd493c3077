"""Own optimisers, schedules and callbacks: what they step, what is refused, and what a checkpoint remembers of them."""

import re
from functools import partial
from types import SimpleNamespace

import helpers
import ppo_helpers
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, Timer

from lit_vapo.advantages.rloo import Rloo
from lit_vapo.commands.endings import told
from lit_vapo.commands.export import export
from lit_vapo.commands.run import StageCLI
from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.stages.optimisers import build_optimizer
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.stages.sft.module import SFTModule

Adam = partial(torch.optim.Adam, betas=(0.5, 0.9))
ByTwo = partial(torch.optim.lr_scheduler.StepLR, step_size=2)
PAGE = (helpers.CONFIGS.parent / "docs" / "runs.md").read_text()


def groups():
    return [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": lr} for lr in (0.1, 0.01)]


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_the_default_is_adamw_with_a_linear_schedule():
    # Of four steps one is warm-up: 1, 1, 2/3, 1/3.
    optimizer, scheduler = build_optimizer("adamw", "linear", groups(), lambda: 4, weight_decay=0.3, warmup_steps=1)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]
    for factor in (1, 1, 2 / 3, 1 / 3, 0):
        assert rates(optimizer) == pytest.approx([0.1 * factor, 0.01 * factor], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_another_keeps_the_learning_rates_of_its_groups():
    def unasked():
        raise AssertionError

    optimizer, scheduler = build_optimizer(Adam, ByTwo, groups(), unasked)
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["betas"] == (0.5, 0.9)
    for factor in (1, 1, 0.1):  # StepLR: a tenth after each two steps
        assert rates(optimizer) == pytest.approx([0.1 * factor, 0.01 * factor])
        optimizer.step()
        scheduler.step()


def test_a_refusal_of_a_class_says_where_it_was_asked_for():
    vector = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1}]
    with pytest.raises(ValueError, match="^model.optimizer: Muon only supports 2D"):
        build_optimizer(torch.optim.Muon, "linear", vector, lambda: 1)
    with pytest.raises(ValueError, match="^model.lr_scheduler: .*step_size"):
        build_optimizer("adamw", torch.optim.lr_scheduler.StepLR, groups(), lambda: 1)
    with pytest.raises(ValueError, match="schedule by steps alone, got ReduceLROnPlateau"):
        build_optimizer("adamw", torch.optim.lr_scheduler.ReduceLROnPlateau, groups(), lambda: 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": Adam, "weight_decay": 0.1}, "model.weight_decay: expected none beside model.optimizer"),
        ({"lr_scheduler": ByTwo, "warmup_steps": 3}, "model.warmup_steps: expected none beside model.lr_scheduler"),
        ({"optimizer": "adam"}, "model.optimizer: expected adamw, or a class by its path, got 'adam'"),
    ],
)
def test_what_another_would_not_read_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SFTModule(Pretrained("a"), **options)
    SFTModule(Pretrained("a"), optimizer=Adam, lr_scheduler=ByTwo, warmup_steps=0)


@pytest.fixture(scope="module")
def made(tiny_model_dir, tmp_path_factory):
    """A run of the reward stage with another optimiser: module, data, trainer, checkpoint."""
    folder = tmp_path_factory.mktemp("optimisers")
    module, data = reward(tiny_model_dir, folder, optimizer=Adam, lr_scheduler=ByTwo)
    trainer = ppo_helpers.trainer(folder, max_steps=2, max_epochs=-1, limit_val_batches=0)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "end.ckpt")
    return trainer, folder


def reward(model, folder, **options):
    pairs = helpers.tiny_preferences(folder / "pairs.jsonl", 8)
    data = PreferenceDataModule(model, pairs, validation_fraction=0.0, batch_size=4, max_length=64)
    return RewardModule(Pretrained(model), feature_cache=str(folder / "features"), **options), data


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
class TestCheckpoint:
    def test_it_says_what_stepped_and_needs_no_trust(self, made, tmp_path):
        trainer, folder = made
        assert type(trainer.optimizers[0]) is torch.optim.Adam
        settings = torch.load(folder / "end.ckpt", weights_only=True)["hyper_parameters"]
        assert settings["optimizer"] == {
            "class_path": "torch.optim.adam.Adam",
            "init_args": {"betas": [0.5, 0.9]},
        }
        export(str(folder / "end.ckpt"), str(tmp_path / "ensemble"))
        assert "torch.optim.adam.Adam" in (tmp_path / "ensemble" / "README.md").read_text()

    def test_another_class_does_not_go_on_from_it(self, made, tiny_model_dir):
        _, folder = made
        for options, message in (
            ({}, "model.optimizer: expected torch.optim.adam.Adam, whose state the checkpoint has, got adamw"),
            ({"optimizer": Adam}, "model.lr_scheduler: expected torch.optim.lr_scheduler.StepLR, .*, got linear"),
        ):
            module, data = reward(tiny_model_dir, folder, **options)
            trainer = ppo_helpers.trainer(folder, max_steps=3, max_epochs=-1, limit_val_batches=0)
            with pytest.raises(ValueError, match=message):
                trainer.fit(module, data, ckpt_path=folder / "end.ckpt", weights_only=True)

    def test_one_of_an_earlier_version_was_stepped_by_ours(self, made, tiny_model_dir, tmp_path):
        _, folder = made
        module, data = reward(tiny_model_dir, folder)
        trainer = ppo_helpers.trainer(tmp_path, max_steps=1, max_epochs=-1, limit_val_batches=0)
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
        for key in ("optimizer", "lr_scheduler"):
            del saved["hyper_parameters"][key]
        torch.save(saved, tmp_path / "old.ckpt")
        trainer = ppo_helpers.trainer(tmp_path, max_steps=2, max_epochs=-1, limit_val_batches=0)
        module, data = reward(tiny_model_dir, folder)
        trainer.fit(module, data, ckpt_path=tmp_path / "old.ckpt", weights_only=True)
        assert trainer.global_step == 2


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_matrices_alone_are_learned_by_muon(tiny_model_dir, tmp_path):
    source = ppo_helpers.ensemble(tmp_path / "ensemble", tiny_model_dir)
    data = ppo_helpers.prompt_data(tiny_model_dir, tmp_path, 8)
    options = {"lora": Lora(2), "optimizer": torch.optim.Muon, "sampling": Sampling(4, num_responses=2)}
    module = ppo_helpers.ppo_module(tiny_model_dir, source, advantage=Rloo(), **options)
    rows = ppo_helpers.fit_ppo(module, data, tmp_path)
    assert rows[0]["train/first_ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[1]["train/kl_k3"] > 0
    # A critic has a bias.
    with pytest.raises(ValueError, match=r"model.optimizer: Muon .* torch.Size\(\[1\]\)"):
        ppo_helpers.fit_ppo(ppo_helpers.ppo_module(tiny_model_dir, source, **options), data, tmp_path)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_a_figure_that_nobody_logs_is_one_message(tiny_model_dir, tmp_path):
    module, data = reward(tiny_model_dir, tmp_path)
    trainer = ppo_helpers.trainer(tmp_path, limit_val_batches=0, callbacks=[EarlyStopping("val/figure")])
    with pytest.raises(ValueError, match="^trainer.callbacks: .*`val/figure`.*`train/loss`"), told(SimpleNamespace()):
        trainer.fit(module, data)


class Parsed(StageCLI):
    """A stage with everything made, and nothing run."""

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture
def parsed(tiny_model_dir, tiny_ensemble_dir, tiny_prompts_file, tmp_path):
    """The PPO stage as options say."""
    (tmp_path / "page.yaml").write_text(re.search(r"```yaml\n(# my_trainer.yaml\n.*?)```", PAGE, re.DOTALL)[1])

    def call(*options):
        given = {
            "trainer.accelerator": "cpu",
            "trainer.default_root_dir": tmp_path / "run",
            "model.base.path": tiny_model_dir,
            "model.reward": tiny_ensemble_dir,
            "data.prompts": tiny_prompts_file,
        }
        words = ["fit", f"--config={tmp_path / 'page.yaml'}", *(f"--{key}={value}" for key, value in given.items())]
        return Parsed(PPOModule, PromptDataModule, stage="ppo", args=[*words, *options])

    return call


def test_the_example_of_the_docs_is_what_a_run_takes(parsed):
    cli = parsed()
    optimizer, scheduler = build_optimizer(cli.model.optimizer, cli.model.lr_scheduler, groups(), lambda: 0)
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert rates(optimizer) == [0.1, 0.01]
    assert scheduler.T_max == 200
    assert {EarlyStopping, Timer} <= {type(callback) for callback in cli.trainer.callbacks}
    # What a run saves of it is YAML, the enumeration among the defaults of `Timer` as well.
    saved = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"]
    assert saved["trainer"]["callbacks"][1]["init_args"]["interval"] == "step"
    assert saved["model"]["optimizer"]["class_path"] == "torch.optim.Adam"


def test_a_learning_rate_has_one_place(parsed, capsys):
    for option, said in (
        (".lr=1", "model.optimizer: expected an option of Adam (betas, eps, "),
        ("=adamv", "model.optimizer: expected one of adamw, or a class of yours by its import path, got 'adamv'"),
    ):
        with pytest.raises(SystemExit):
            parsed(f"--model.optimizer{option}")
        text = capsys.readouterr().err
        assert said in text
        assert ("The learning rate is model.learning_rate." in text) == (option == ".lr=1")
        assert "Union" not in text
