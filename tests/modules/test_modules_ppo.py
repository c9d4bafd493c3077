"""The PPO stage as a Lightning module: learning, resuming, evaluating, refusing."""

import math
import os
import subprocess
import sys
from pathlib import Path

import ppo_helpers
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import ddp_worker
from peft import PeftModel
from ppo_helpers import ppo_module, prompt_data, state
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Sampling
from lit_vapo.models.trunk import length_mask
from lit_vapo.modules.export import export
from lit_vapo.modules.ppo import PPOModule
from lit_vapo.modules.ppo_update import UpdateSettings
from lit_vapo.objectives.variance_aware import VarianceAware


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("ppo") / "ensemble", tiny_model_dir)


class Recorder(Callback):
    """Keeps the metrics of every iteration."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(module, data, folder, ckpt_path=None, **kwargs):
    recorder = Recorder()
    options = {"limit_val_batches": 0, **kwargs}
    callbacks = [recorder, *options.pop("callbacks", [])]
    trainer = ppo_helpers.trainer(folder, callbacks=callbacks, **options)
    torch.manual_seed(0)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return recorder.rows


def test_two_processes_learn_what_one_does(tiny_model_dir, reward, tmp_path):
    # Six rows of unequal length, dealt out to two processes: whitening, loss and clipping are over all tokens.
    nets = ppo_helpers.networks(tiny_model_dir, reward, critic="lora")
    ddp_worker.save_rollout(tmp_path / "rollout.pt", ppo_helpers.make_rollout(nets, tiny_model_dir, seed=1))
    counts = [int(ddp_worker.load_rollout(tmp_path / "rollout.pt", r, 2).response_mask.sum()) for r in (0, 1)]
    assert counts[0] != counts[1]
    command = [sys.executable, ddp_worker.__file__, tiny_model_dir, reward, str(tmp_path)]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ddp_worker.run(tiny_model_dir, reward, tmp_path)
    output, _ = other.communicate(timeout=120)
    assert other.returncode == 0, output
    one, report = torch.load(tmp_path / "world_1.pt", weights_only=True)
    two, again = torch.load(tmp_path / "world_2.pt", weights_only=True)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0, msg=name)
    for name, value in report.items():
        torch.testing.assert_close(again[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_planted_reward_rises(tiny_model_dir, reward, tmp_path):
    class Planted(Callback):
        """Every member rewards the same direction of the mean hidden state."""

        def on_fit_start(self, trainer, pl_module):
            head = pl_module.networks.reward_model.head
            pl_module.networks.reward_model.spec.pooling = "mean"
            direction = torch.randn(32, generator=torch.Generator().manual_seed(4))
            head.weight.data[:] = direction
            head.bias.data.zero_()
            head.reward_loc.zero_()
            head.reward_scale.fill_(1.0)

    settings = UpdateSettings(epochs=4, minibatches=2)
    module = ppo_module(
        tiny_model_dir, reward, lora=None, update=settings, kl_coef=0.0, critic=CriticSpec(warm_start=False)
    )
    data = prompt_data(tiny_model_dir, tmp_path, count=480, batch_size=32)
    rows = fit(module, data, tmp_path, callbacks=[Planted()])
    means = [row["train/reward_mean"] for row in rows]
    assert len(means) == 15
    first, last = sum(means[:3]) / 3, sum(means[-3:]) / 3
    assert last > first + 1.0 * rows[0]["train/reward_std"], means
    assert rows[-1]["train/kl_k3"] > 1


def test_bf16_mixed_precision_learns(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward)
    rows = fit(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, precision="bf16-mixed", limit_train_batches=2)
    assert all(row["train/actor_grad_norm"] > 0 for row in rows)
    assert rows[0]["train/first_ratio"] == pytest.approx(1, abs=0.02)
    assert all(math.isfinite(v) for row in rows for v in row.values())
    trained = {n: p for n, p in module.named_parameters() if "lora_B.actor" in n}
    assert trained
    assert all(p.abs().max() > 0 for p in trained.values())


def test_fp16_mixed_precision_is_refused(tiny_model_dir, reward, tmp_path, monkeypatch):
    # Lightning itself turns it into bf16-mixed on a CPU.
    monkeypatch.setattr(Trainer, "precision", property(lambda self: "16-mixed"))
    with pytest.raises(ValueError, match=r"trainer.precision: expected 32-true or bf16-mixed for PPO, got 16-mixed"):
        fit(ppo_module(tiny_model_dir, reward), prompt_data(tiny_model_dir, tmp_path), tmp_path)


def test_learning_rate_ends_at_the_planned_number_of_updates(tiny_model_dir, reward, tmp_path):
    # 8 weight updates are 2 iterations of 2 × 2: the rate is 1, then 1/2.
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    data = prompt_data(tiny_model_dir, tmp_path)
    module = ppo_module(tiny_model_dir, reward)
    fit(module, data, tmp_path, callbacks=[Rates()], max_steps=8, max_epochs=-1)
    assert rates == pytest.approx([1e-2, 0.5e-2])


@pytest.mark.parametrize(("target", "direction"), [(1e-4, 1), (1e4, -1)])
def test_adaptive_kl_coefficient_moves_towards_its_target(tiny_model_dir, reward, tmp_path, target, direction):
    # Error limited to a fifth, 4 responses of a horizon of 1024: a factor of 1 ± 0.2·4/1024 an iteration.
    module = ppo_module(tiny_model_dir, reward, kl_coef=0.1, kl_target=target)
    rows = fit(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=3)
    coefficients = [row["train/kl_coef"] for row in rows] + [float(module.kl_coef)]
    # In the first iteration policy and reference are the same: KL 0, below any target.
    assert coefficients[1] / coefficients[0] == pytest.approx(1 - 0.2 * 4 / 1024, rel=1e-6)
    assert coefficients[3] / coefficients[2] == pytest.approx(1 + direction * 0.2 * 4 / 1024, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_model_dir, tmp_path):
    # The ensemble is calibrated at the start, so that its buffers and the objective's live in the checkpoint alone.
    reward = ppo_helpers.ensemble(tmp_path / "raw", tiny_model_dir, calibrated=False)
    objective = {"objective": None, "kl_coef": 0.1, "kl_target": 1.0, "num_reference": 8}
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_epochs=1, save_top_k=-1, filename="{step}")
    data = prompt_data(tiny_model_dir, tmp_path)
    whole = ppo_module(tiny_model_dir, reward, **objective)
    fit(whole, data, tmp_path, limit_train_batches=2, max_epochs=2, callbacks=[keep], enable_checkpointing=True)
    saved = torch.load(tmp_path / "ckpt" / "step=8.ckpt", weights_only=True)
    assert saved["state_dict"]["kl_coef"] != pytest.approx(0.1, abs=1e-8)
    head = whole.networks.reward_model.head
    assert bool(head.calibrated)
    torch.testing.assert_close(saved["state_dict"]["networks.reward_model.head.reward_loc"], head.reward_loc)
    torch.testing.assert_close(saved["state_dict"]["objective.reference_variance"], head.reference_variance)

    resumed = ppo_module(tiny_model_dir, reward, **{**objective, "num_reference": 4})
    path = tmp_path / "ckpt" / "step=8.ckpt"
    keep = ModelCheckpoint(tmp_path / "again", every_n_epochs=1, save_top_k=-1, filename="{step}")
    options = {"limit_train_batches": 2, "max_epochs": 2, "callbacks": [keep], "enable_checkpointing": True}
    rows = fit(resumed, data, tmp_path, path, **options)
    assert rows[0]["train/kl_coef"] == pytest.approx(float(saved["state_dict"]["kl_coef"]))
    # Not calibrated anew on other responses:
    torch.testing.assert_close(resumed.networks.reward_model.head.reward_loc, head.reward_loc)
    torch.testing.assert_close(resumed.objective.reference_variance, head.reference_variance)


def test_checkpoints_hold_what_training_changed_and_nothing_else(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward)
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=1, callbacks=[keep],
        enable_checkpointing=True)  # fmt: skip
    names = set(torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["state_dict"])
    own = ("lora_", "value_head", "reward_model.head", "kl_coef", "objective.")
    assert all(any(word in name for word in own) for name in names)
    assert {"kl_coef", "networks.critic.value_head.weight", "networks.reward_model.head.weight"} <= names


def test_exported_policy_gives_the_same_logprobs(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward, critic=CriticSpec("lora"))
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=1, callbacks=[keep],
        enable_checkpointing=True)  # fmt: skip
    export(str(tmp_path / "ckpt" / "last.ckpt"), str(tmp_path / "policy"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    peft = PeftModel.from_pretrained(base, tmp_path / "policy").eval()
    rows = ppo_helpers.make_rollout(module.networks, tiny_model_dir).rows
    expected = full_logprobs(peft, rows)
    actual = module.networks.actor(rows, 1.0).logprobs
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    with peft.disable_adapter():
        assert (full_logprobs(peft, rows) - actual).abs().max() > 1e-3
    AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert (tmp_path / "policy" / "critic" / "critic.safetensors").is_file()
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        export(str(tmp_path / "ckpt" / "last.ckpt"), str(tmp_path / "policy"))


def test_exported_full_model_gives_the_same_logprobs(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward, lora=None, learning_rate=1e-3)
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=1, callbacks=[keep],
        enable_checkpointing=True)  # fmt: skip
    export(str(tmp_path / "ckpt" / "last.ckpt"), str(tmp_path / "policy"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    rows = ppo_helpers.make_rollout(module.networks, tiny_model_dir).rows
    torch.testing.assert_close(
        module.networks.actor(rows, 1.0).logprobs, full_logprobs(loaded, rows), atol=1e-5, rtol=0
    )


@torch.no_grad()
def full_logprobs(lm, rows):
    """Log-probabilities of the responses from the whole logits."""
    mask = length_mask(rows.lengths, rows.input_ids.shape[1])
    logits = lm(input_ids=rows.input_ids, attention_mask=mask.long()).logits.float().log_softmax(-1)
    out = torch.zeros(rows.response_mask.shape)
    for i, start in enumerate(rows.prompt_lengths.tolist()):
        for t in range(int(rows.response_mask[i].sum())):
            out[i, t] = logits[i, start + t - 1, rows.input_ids[i, start + t]]
    return out


def test_evaluation_has_its_own_random_numbers(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward)
    data = prompt_data(tiny_model_dir, tmp_path, validation_fraction=0.5)
    texts, states = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        ppo_helpers.trainer(tmp_path).validate(module, data, verbose=False)
        states.append(torch.equal(before, torch.get_rng_state()))
        texts.append([record["response"] for record in module.samples])
    assert texts[0] == texts[1] != []
    assert len(set(texts[0])) > 1
    torch.manual_seed(5)
    before = torch.get_rng_state()
    module._evaluate = PPOModule._evaluate.__get__(module)
    module.log = lambda *args, **kwargs: None
    batch = next(iter(data.val_dataloader()))
    before = torch.get_rng_state()
    module.validation_step(batch, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_an_untrained_policy_answers_as_the_reference_does(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward)
    data = prompt_data(tiny_model_dir, tmp_path, validation_fraction=0.5)
    (result,) = ppo_helpers.trainer(tmp_path).test(module, data, verbose=False)
    assert result["test/kl_k3"] == pytest.approx(0, abs=1e-6)
    for name, value in result.items():
        if name.startswith("test/"):
            assert result[name.replace("test/", "test_reference/")] == pytest.approx(value, abs=1e-4), name
    owners = {record["policy"] for record in module.samples}
    assert owners == {"policy", "reference"}


def test_prediction_returns_scored_texts(tiny_model_dir, reward, tmp_path):
    data = prompt_data(tiny_model_dir, tmp_path, validation_fraction=0.5)
    module = ppo_module(tiny_model_dir, reward)
    batches = ppo_helpers.trainer(tmp_path).predict(module, data)
    records = [record for batch in batches for record in batch]
    assert len(records) == len(data.prompt_rows("test"))
    assert {"prompt", "response", "members", "sigma", "kl"} <= set(records[0])


def test_a_run_longer_than_the_context_is_refused(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward, sampling=Sampling(100))
    with pytest.raises(ValueError, match="expected at most the model's context of 128 tokens, got 148"):
        fit(module, prompt_data(tiny_model_dir, tmp_path), tmp_path)


def test_plain_loaders_are_refused(tiny_model_dir, reward, tmp_path):
    loader = prompt_data(tiny_model_dir, tmp_path).train_dataloader()
    with pytest.raises(ValueError, match="expected a PromptDataModule"):
        ppo_helpers.trainer(tmp_path).fit(ppo_module(tiny_model_dir, reward), loader, loader)


def test_critic_warmup_is_in_force_in_the_first_iterations_only(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward, update=UpdateSettings(1, 1, critic_warmup=1))
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            actor = {n: p for n, p in state(pl_module).items() if "lora_B" in n}
            seen.append(max(p.abs().max().item() for p in actor.values()))

    fit(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, callbacks=[Watch()], limit_train_batches=2)
    assert seen[0] == 0
    assert seen[1] > 0


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("kl_coef", -0.1, "model.kl_coef: expected a number of 0 or more, got -0.1"),
        ("kl_target", 0.0, "model.kl_target: expected a number above 0"),
        ("learning_rate", 0.0, "model.learning_rate: expected a number above 0"),
        ("reward_clip", -1.0, "model.reward_clip: expected a number above 0"),
    ],
)
def test_options_out_of_range_are_refused(tiny_model_dir, reward, option, value, expected):
    with pytest.raises(ValueError, match=expected):
        ppo_module(tiny_model_dir, reward, **{option: value})


def test_one_member_is_refused_before_anything_is_loaded(tiny_model_dir, tmp_path):
    reward = ppo_helpers.ensemble(tmp_path / "one", tiny_model_dir, members=1)
    with pytest.raises(ValueError, match="expected at least 2 members, got 1"):
        ppo_module(str(Path("nowhere")), reward, objective=VarianceAware())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_checkpoint_of_another_architecture_is_refused(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward)
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    data = prompt_data(tiny_model_dir, tmp_path)
    fit(module, data, tmp_path, limit_train_batches=1, callbacks=[keep], enable_checkpointing=True)
    wide = ppo_module(tiny_model_dir, ppo_helpers.ensemble(tmp_path / "five", tiny_model_dir, members=5))
    with pytest.raises(ValueError, match="checkpoint of another architecture: expected .* of shape"):
        fit(wide, data, tmp_path, tmp_path / "ckpt" / "last.ckpt", callbacks=[keep], enable_checkpointing=True)
    other = ppo_module(tiny_model_dir, reward, critic=CriticSpec("lora"))
    with pytest.raises(ValueError, match="checkpoint of another architecture: no weights for"):
        fit(other, data, tmp_path, tmp_path / "ckpt" / "last.ckpt", callbacks=[keep], enable_checkpointing=True)
