"""The stages that make a reward ensemble and a base policy."""

import json

import helpers
import ppo_helpers
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_vapo.cli import main
from lit_vapo.commands.export import export
from lit_vapo.data.collate import SFTBatch
from lit_vapo.data.datamodule import PreferenceDataModule, SFTDataModule
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.stages.sft.module import SFTModule
from lit_vapo.types import TokenSequence


def pairs(model, file, **kwargs):
    options = {"validation_fraction": 0.3, "max_length": 64, "batch_size": 4, **kwargs}
    return PreferenceDataModule(model, preferences=file, **options)


def reward_module(model, **kwargs):
    options = {"head": HeadEnsemble(3), "learning_rate": 1e-2, **kwargs}
    return RewardModule(Pretrained(model), **options)


def fit(module, data, folder, **kwargs):
    torch.manual_seed(0)
    keep = ModelCheckpoint(folder / "ckpt", save_last=True)
    trainer = ppo_helpers.trainer(folder, callbacks=[keep], **{"enable_checkpointing": True, **kwargs})
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("layer", [None, 1])
def test_an_ensemble_learns_evaluates_and_loads_back(tiny_model_dir, tiny_preferences_file, tmp_path, freeze, layer):
    module = reward_module(
        tiny_model_dir,
        layer=layer,
        pooling="mean",
        freeze_backbone=freeze,
        backbone_learning_rate=1e-4,
        reference=Pretrained(tiny_model_dir),
        reference_sampling=Sampling(6),
        num_reference=12,
    )
    data = pairs(tiny_model_dir, tiny_preferences_file)
    fit(module, data, tmp_path, max_epochs=8)
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["state_dict"]
    assert bool(saved["head.calibrated"])
    assert any(name.startswith("backbone.") for name in saved) != freeze

    # fit, then test with the same module and data, as a program does.
    (result,) = ppo_helpers.trainer(tmp_path).test(module, data, verbose=False)
    assert result["test/accuracy"] > 0.9
    found = json.loads((tmp_path / "test" / "evaluation.json").read_text())
    assert len(found["members"]) == 3
    assert found["mean"]["accuracy"] == pytest.approx(result["test/accuracy"])
    assert found["num_pairs"] == len(data.preference_rows("test"))
    assert result["test/member_nll"] == pytest.approx(sum(m["nll"] for m in found["members"]) / 3)

    export(str(tmp_path / "ckpt" / "last.ckpt"), str(tmp_path / "ensemble"))
    loaded = RewardModel.from_pretrained(tmp_path / "ensemble")
    batch = next(iter(pairs(tiny_model_dir, tiny_preferences_file).val_dataloader()))
    estimate = loaded(batch.chosen_ids, batch.chosen_lengths, batch.prompt_lengths)
    module.backbone = loaded.backbone if freeze else module.backbone.eval()
    with torch.no_grad():
        expected = module.reward_model()(batch.chosen_ids, batch.chosen_lengths, batch.prompt_lengths)
    torch.testing.assert_close(estimate, expected, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "ensemble" / "backbone").is_dir() != freeze


def test_bootstrap_and_training_are_reproducible(tiny_model_dir, tiny_preferences_file, tmp_path):
    weights = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        module = reward_module(tiny_model_dir, head=HeadEnsemble(3, seed=seed))
        fit(module, pairs(tiny_model_dir, tiny_preferences_file), tmp_path / name, max_epochs=2)
        weights.append(module.head.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_members_are_calibrated_on_reference_responses(tiny_model_dir, tiny_preferences_file, tmp_path, monkeypatch):
    seen = []
    calibrate = HeadEnsemble.calibrate
    monkeypatch.setattr(HeadEnsemble, "calibrate", lambda self, x: seen.append(x) or calibrate(self, x))
    module = reward_module(tiny_model_dir, reference=Pretrained(tiny_model_dir), num_reference=10,
                           reference_sampling=Sampling(4))  # fmt: skip
    fit(module, pairs(tiny_model_dir, tiny_preferences_file), tmp_path, max_epochs=2)
    assert {x.shape for x in seen} == {(10, 32)}
    members = module.head(seen[-1]).members
    torch.testing.assert_close(members.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(members.std(0), torch.ones(3), atol=1e-4, rtol=0)


def test_the_cache_is_hit_a_second_time_and_missed_for_other_settings(
    tiny_model_dir, tiny_preferences_file, tmp_path, monkeypatch
):
    from lit_vapo.stages.reward import building as reward_building

    calls = []
    compute = reward_building.compute_layers
    monkeypatch.setattr(reward_building, "compute_layers", lambda *a: calls.append(len(a[1])) or compute(*a))
    cache = str(tmp_path / "cache")
    data = pairs(tiny_model_dir, tiny_preferences_file)

    def computed(**options):
        """How many sets of sequences a run computes features of: train, val, and val with responses cut in half."""
        calls.clear()
        module = reward_module(tiny_model_dir, feature_cache=cache, **options)
        ppo_helpers.trainer(tmp_path).fit(module, data)
        return len(calls), module.spec.layer

    count, chosen = computed()
    assert count == 3
    assert computed() == (0, chosen)
    # One of the layers that were tried is there already.
    assert computed(layer=chosen) == (0, chosen)
    assert computed(pooling="last")[0] == 3
    assert computed(reference_sampling=Sampling(stop_token_ids=[9]))[0] == 3


def test_somebody_s_own_loaders_are_encoded_as_they_come(tiny_model_dir, tiny_preferences_file, tmp_path):
    data = pairs(tiny_model_dir, tiny_preferences_file)
    module = reward_module(tiny_model_dir)
    trainer = ppo_helpers.trainer(tmp_path, max_epochs=8)
    trainer.fit(module, data.train_dataloader(), data.val_dataloader())
    assert trainer.callback_metrics["val/nll"] < 0.5


def test_bad_reward_settings_are_refused(tiny_model_dir):
    with pytest.raises(ValueError, match=r"model.num_reference: expected at least 2, got 1"):
        reward_module(tiny_model_dir, num_reference=1)
    with pytest.raises(ValueError, match=r"model.base.quantization: expected null where .* are trained, got 8bit"):
        RewardModule(Pretrained(tiny_model_dir, quantization="8bit"), freeze_backbone=False)


# Supervised fine-tuning.


def brute_loss(lm, rows):
    """Cross-entropy on response tokens only; without a prompt the first token cannot be predicted."""
    total, count = 0.0, 0
    for ids, prompt in rows:
        logprobs = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(max(1, prompt), len(ids)):
            total -= logprobs[t - 1, ids[t]].item()
            count += 1
    return total / count


def demonstrations(ids, lengths, prompts):
    every = torch.ones(len(ids), dtype=torch.bool)
    return SFTBatch(ids, torch.tensor(lengths), torch.tensor(prompts), torch.arange(len(ids)), every)


def test_loss_is_the_cross_entropy_of_response_tokens(tiny_model_dir):
    # One of the rows has no prompt.
    rows = [([5, 6, 7, 8, 0], 2), ([9, 10, 11], 0), ([12, 13, 14, 15], 3)]
    ids = torch.full((3, 5), 299)
    for i, (row, _) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    batch = demonstrations(ids, [len(r) for r, _ in rows], [p for _, p in rows])
    module = SFTModule(Pretrained(tiny_model_dir))
    module.configure_model()
    module.log = lambda *args, **kwargs: None
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    assert module.training_step(batch, 0).item() == pytest.approx(brute_loss(lm, rows), rel=1e-5)
    assert module.training_step(demonstrations(torch.tensor([[5]]), [1], [0]), 0).item() == 0
    # A row that stands in is not learned from.
    counted = batch._replace(counts=torch.tensor([True, False, True]))
    assert module.training_step(counted, 0).item() == pytest.approx(brute_loss(lm, rows[::2]), rel=1e-5)
    assert module.training_step(batch._replace(counts=torch.zeros(3, dtype=torch.bool)), 0).item() == 0


@pytest.mark.parametrize("lora", [None, Lora(4)])
def test_fine_tuning_lowers_the_loss_and_exports_the_model(tiny_model_dir, tiny_preferences_file, tmp_path, lora):
    data = SFTDataModule(
        tiny_model_dir, preferences=tiny_preferences_file, validation_fraction=0.3, max_length=64, batch_size=4
    )
    module = SFTModule(Pretrained(tiny_model_dir), lora, learning_rate=1e-2, warmup_steps=2)
    (before,) = ppo_helpers.trainer(tmp_path).test(module, data, verbose=False)
    trainer = fit(module, data, tmp_path, max_epochs=3)
    assert isinstance(trainer, Trainer)
    assert trainer.callback_metrics["val/loss"] < before["test/loss"] - 0.5
    export(str(tmp_path / "ckpt" / "last.ckpt"), str(tmp_path / "policy"))
    # Adapters are merged: the folder is an ordinary model either way.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    if lora is not None:
        names = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["state_dict"]
        assert all("lora_" in name for name in names)
    rows = [(r["chosen_ids"], r["prompt_length"]) for r in data.preference_rows("val")]
    with torch.no_grad():
        assert brute_loss(loaded, rows) == pytest.approx(brute_loss(module.policy.lm, rows), abs=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "<eos>"


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_the_held_out_loss_is_that_of_all_tokens_in_whatever_batches(tiny_model_dir, tmp_path, batch_size):
    # Responses of unequal length, and a row that is there twice.
    rows = [{"prompt": f"{i}", "chosen": "good " * (1 + i * i % 7), "rejected": "bad"} for i in range(7)]
    file = helpers.write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[4]])
    options = {"validation_fraction": 0.0, "max_length": 64, "batch_size": batch_size}
    data = SFTDataModule(tiny_model_dir, preferences=file, preferences_test=file, **options)
    module = SFTModule(Pretrained(tiny_model_dir))
    (found,) = ppo_helpers.trainer(tmp_path).test(module, data, verbose=False)
    once = {row["example_id"]: (row["chosen_ids"], row["prompt_length"]) for row in data.preference_rows("test")}
    assert len(once) == 7
    with torch.no_grad():
        assert found == {"test/loss": pytest.approx(brute_loss(module.policy.lm, once.values()), rel=1e-5)}


def test_an_empty_prompt_can_be_learned_from(tiny_model_dir, tmp_path):
    file = helpers.write_jsonl(
        tmp_path / "empty.jsonl",
        [{"prompt": "", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)],
    )
    data = SFTDataModule(tiny_model_dir, preferences=file, validation_fraction=0.0, max_length=32, batch_size=3)
    assert {r["prompt_length"] for r in data.preference_rows("train")} == {0}
    trainer = fit(SFTModule(Pretrained(tiny_model_dir), learning_rate=1e-3), data, tmp_path, limit_val_batches=0)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_a_loss_that_is_not_finite_is_refused(tiny_model_dir, tiny_preferences_file, tmp_path):
    module = reward_module(tiny_model_dir)
    data = pairs(tiny_model_dir, tiny_preferences_file)
    data.preference_rows("train")
    original = data.use_features
    data.use_features = lambda split, chosen, rejected: original(split, chosen * float("nan"), rejected)
    with pytest.raises(ValueError, match=r"loss: expected a finite number, got nan in batch 0"):
        fit(module, data, tmp_path, num_sanity_val_steps=0)
    assert TokenSequence([1], 1).prompt_length == 1


def test_a_reference_is_asked_once(tiny_model_dir, stage_args, tmp_path, monkeypatch):
    words = ("--model.num_reference=4", "--model.reference_sampling.max_new_tokens=4")
    options = {"model__reference__path": tiny_model_dir, "model__feature_cache": tmp_path / "cache"}
    main(stage_args("reward", "fit", tmp_path / "first", *words, **options))
    (kept,) = (tmp_path / "cache").glob("*.responses.json")

    def asked(*args):
        raise AssertionError("the reference was asked again")

    monkeypatch.setattr("lit_vapo.stages.reward.building.sample_references", asked)
    main(stage_args("reward", "fit", tmp_path / "again", *words, **options))
    first, again = (torch.load(helpers.last(tmp_path / name), weights_only=True) for name in ("first", "again"))
    assert torch.equal(again["state_dict"]["head.reward_loc"], first["state_dict"]["head.reward_loc"])
    # Another seed is another sample; and what was damaged is as good as none.
    kept.write_text(kept.read_text().replace("[[", "[[1, ", 1))
    for run, other in (("other", ["--model.seed=1"]), ("damaged", [])):
        with pytest.raises(AssertionError, match="asked again"):
            main(stage_args("reward", "fit", tmp_path / run, *words, *other, **options))
