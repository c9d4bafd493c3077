"""What a PPO run keeps, resumes from, refuses and exports."""

import ppo_helpers
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from ppo_helpers import fit_ppo, ppo_module, prompt_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_vapo.commands.export import export
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Shaping
from lit_vapo.models.pretrained import Lora
from lit_vapo.models.trunk import length_mask


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("ppo") / "ensemble", tiny_model_dir)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_coefficient_and_calibration_survive_a_resumption(tiny_model_dir, tmp_path):
    # The ensemble is calibrated at the start, so that its buffers live in the checkpoint alone.
    reward = ppo_helpers.ensemble(tmp_path / "raw", tiny_model_dir, calibrated=False)
    objective = {"objective": None, "kl_coef": 0.1, "kl_target": 1.0, "num_reference": 8}
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_epochs=1, save_top_k=-1, filename="{step}")
    data = prompt_data(tiny_model_dir, tmp_path)
    whole = ppo_module(tiny_model_dir, reward, **objective)
    fit_ppo(whole, data, tmp_path, limit_train_batches=2, max_epochs=2, callbacks=[keep], enable_checkpointing=True)
    saved = torch.load(tmp_path / "ckpt" / "step=8.ckpt", weights_only=True)
    assert saved["state_dict"]["kl.coef"] != pytest.approx(0.1, abs=1e-8)
    head = whole.reward.model.head
    assert bool(head.calibrated)
    torch.testing.assert_close(saved["state_dict"]["reward.model.head.reward_loc"], head.reward_loc)
    torch.testing.assert_close(saved["state_dict"]["reward.model.head.reference_variance"], head.reference_variance)

    resumed = ppo_module(tiny_model_dir, reward, **{**objective, "num_reference": 4})
    path = tmp_path / "ckpt" / "step=8.ckpt"
    keep = ModelCheckpoint(tmp_path / "again", every_n_epochs=1, save_top_k=-1, filename="{step}")
    options = {"limit_train_batches": 2, "max_epochs": 2, "callbacks": [keep], "enable_checkpointing": True}
    rows = fit_ppo(resumed, data, tmp_path, path, **options)
    assert rows[0]["train/kl_coef"] == pytest.approx(float(saved["state_dict"]["kl.coef"]))
    # Not calibrated anew on other responses:
    torch.testing.assert_close(resumed.reward.model.head.reward_loc, head.reward_loc)
    torch.testing.assert_close(resumed.reward.model.head.reference_variance, head.reference_variance)


def test_checkpoints_hold_what_training_changed_and_nothing_else(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward)
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=1, callbacks=[keep],
        enable_checkpointing=True)  # fmt: skip
    names = set(torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["state_dict"])
    own = ("lora_", "value_head", "reward.model.head", "kl.coef", "objective.")
    assert all(any(word in name for word in own) for name in names)
    assert {"kl.coef", "networks.critic.value_head.weight", "reward.model.head.weight"} <= names


def test_exported_policy_gives_the_same_logprobs(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward, critic=CriticSpec("lora"))
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=1, callbacks=[keep],
        enable_checkpointing=True)  # fmt: skip
    export(str(tmp_path / "ckpt" / "last.ckpt"), str(tmp_path / "policy"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    peft = PeftModel.from_pretrained(base, tmp_path / "policy").eval()
    rows = ppo_helpers.make_rollout(module, tiny_model_dir).rows
    expected = full_logprobs(peft, rows)
    actual = module.networks.actor(rows, Shaping()).logprobs
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    with peft.disable_adapter():
        assert (full_logprobs(peft, rows) - actual).abs().max() > 1e-3
    AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert (tmp_path / "policy" / "critic" / "critic.safetensors").is_file()
    with pytest.raises(FileExistsError, match=r"expected a new or empty folder"):
        export(str(tmp_path / "ckpt" / "last.ckpt"), str(tmp_path / "policy"))


def test_exported_full_model_gives_the_same_logprobs(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward, lora=None, learning_rate=1e-3)
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    fit_ppo(module, prompt_data(tiny_model_dir, tmp_path), tmp_path, limit_train_batches=1, callbacks=[keep],
        enable_checkpointing=True)  # fmt: skip
    export(str(tmp_path / "ckpt" / "last.ckpt"), str(tmp_path / "policy"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    rows = ppo_helpers.make_rollout(module, tiny_model_dir).rows
    torch.testing.assert_close(
        module.networks.actor(rows, Shaping()).logprobs, full_logprobs(loaded, rows), atol=1e-5, rtol=0
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


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_checkpoint_of_another_architecture_is_refused(tiny_model_dir, reward, tmp_path):
    module = ppo_module(tiny_model_dir, reward)
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    data = prompt_data(tiny_model_dir, tmp_path)
    fit_ppo(module, data, tmp_path, limit_train_batches=1, callbacks=[keep], enable_checkpointing=True)
    wide = ppo_module(tiny_model_dir, reward, lora=Lora(8, 16.0))
    with pytest.raises(ValueError, match=r"checkpoint of another architecture: expected .* of shape"):
        fit_ppo(wide, data, tmp_path, tmp_path / "ckpt" / "last.ckpt", callbacks=[keep], enable_checkpointing=True)
    other = ppo_module(tiny_model_dir, reward, critic=CriticSpec("lora"))
    with pytest.raises(ValueError, match=r"checkpoint of another architecture: no weights for"):
        fit_ppo(other, data, tmp_path, tmp_path / "ckpt" / "last.ckpt", callbacks=[keep], enable_checkpointing=True)
