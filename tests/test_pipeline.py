"""The whole pipeline by its commands on a tiny model: fit, test, export, load, resume, refuse."""

import json
from pathlib import Path

import hostile_helpers
import pytest
import torch
from helpers import read_jsonl, tiny_model, tiny_tokenizer, write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lit_vapo.cli import main
from lit_vapo.rewards.reward_model import RewardModel


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, tiny_preferences_file, tiny_prompts_file):
    """Run a stage with its tiny config in a folder of this module."""
    root = tmp_path_factory.mktemp("pipeline")

    def call(stage, command, *options, folder=None, **replaced):
        given = {
            "config": f"configs/{stage}/tiny.yaml",
            "trainer.default_root_dir": str(root / (folder or stage)),
            "model.base.path": tiny_model_dir,
            "data.tokenizer": tiny_model_dir,
            "data.preferences": tiny_preferences_file,
            "data.prompts": tiny_prompts_file,
        }
        if stage == "ppo":
            given["model.reward"] = str(root / "ensemble")
        given.update({k.replace("__", "."): str(v) for k, v in replaced.items()})
        main([stage, command, *(f"--{k}={v}" for k, v in given.items()), *options])
        return root / (folder or stage)

    call.root = root
    return call


@pytest.fixture(scope="module")
def sft(run):
    return run("sft", "fit")


@pytest.fixture(scope="module")
def reward(run, tiny_model_dir):
    folder = run(
        "reward",
        "fit",
        f"--model.reference.path={tiny_model_dir}",
        "--model.reference_sampling.max_new_tokens=6",
        "--model.num_reference=12",
    )
    main(["export", f"--checkpoint={folder}/checkpoints/last.ckpt", f"--output={run.root / 'ensemble'}"])
    return folder


@pytest.fixture(scope="module")
def ppo(run, reward):
    return run("ppo", "fit")


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_sft_changes_weights_and_exports_a_model(sft, run, tiny_model_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    output = run.root / "sft-export"
    main(["export", f"--checkpoint={sft}/checkpoints/last.ckpt", f"--output={output}"])
    tuned = AutoModelForCausalLM.from_pretrained(output)
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True))


def test_reward_checkpoint_holds_the_head_and_its_calibration_alone(reward):
    weights = checkpoint(reward)["state_dict"]
    assert all(name.startswith("head.") for name in weights)
    assert bool(weights["head.calibrated"])
    assert (weights["head.reward_scale"] != 1).all()


def test_reward_test_writes_members_and_mean(reward, run):
    run("reward", "test", f"--ckpt_path={reward}/checkpoints/last.ckpt")
    found = json.loads((reward / "test" / "evaluation.json").read_text())
    assert len(found["members"]) == 3
    assert set(found["mean"]) == {"accuracy", "nll", "ece", "brier"}
    assert found["num_pairs"] > 0


def test_exported_ensemble_scores_as_its_checkpoint(reward, run):
    weights = checkpoint(reward)["state_dict"]
    model = RewardModel.from_pretrained(run.root / "ensemble")
    torch.testing.assert_close(model.head.weight, weights["head.weight"])
    ids, lengths = torch.tensor([[5, 9, 11, 40]]), torch.tensor([4])
    features = model.encode(ids, lengths, torch.tensor([2]))
    raw = features @ weights["head.weight"].T + weights["head.bias"]
    expected = (raw - weights["head.reward_loc"]) / weights["head.reward_scale"]
    torch.testing.assert_close(model(ids, lengths, torch.tensor([2])).members, expected, atol=1e-5, rtol=0)


def test_second_run_computes_no_features(reward, run, monkeypatch):
    def forbidden(*args):
        raise AssertionError("features were computed again")

    monkeypatch.setattr("lit_vapo.stages.reward.module.compute_features", forbidden)
    run("reward", "validate", f"--ckpt_path={reward}/checkpoints/last.ckpt")


def test_ppo_changes_adapters_and_keeps_a_small_checkpoint(ppo):
    weights = checkpoint(ppo)["state_dict"]
    assert all("lora_" in n or "critic." in n or n == "kl.coef" or "head." in n or "objective" in n for n in weights)
    lora_b = [w for n, w in weights.items() if "lora_B" in n]
    assert lora_b
    assert any(w.abs().sum() > 0 for w in lora_b)  # peft starts them at zero
    assert (ppo / "finished.json").is_file()


def test_ppo_writes_samples(ppo):
    records = read_jsonl(ppo / "samples_val.jsonl")
    assert records
    assert {"step", "policy", "prompt", "response", "reward", "sigma", "members", "kl", "kl_weight"} <= set(records[0])
    assert len(records[0]["members"]) == 3


def test_ppo_test_compares_policy_and_reference(ppo, run):
    run("ppo", "test", f"--ckpt_path={ppo}/checkpoints/last.ckpt")
    records = read_jsonl(ppo / "test" / "responses.jsonl")
    by_owner = {who: [r["prompt"] for r in records if r["policy"] == who] for who in ("reference", "policy")}
    assert by_owner["reference"] == by_owner["policy"]
    assert all(r["kl"] == 0 for r in records if r["policy"] == "reference")
    found = json.loads((ppo / "test" / "evaluation.json").read_text())
    assert found["num_prompts"] == len(by_owner["policy"])
    assert 0 <= found["comparison"]["reward_win_rate"] <= 1


def test_exported_policy_is_an_ordinary_peft_folder(ppo, run, tiny_model_dir):
    output = run.root / "policy"
    main(["export", f"--checkpoint={ppo}/checkpoints/last.ckpt", f"--output={output}"])
    weights = checkpoint(ppo)["state_dict"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), output)
    loaded = {n.replace(".default.", "."): p for n, p in model.named_parameters() if "lora_" in n}
    saved = {
        n.replace("networks.policy.lm.", "").replace(".actor.", "."): w for n, w in weights.items() if "lora_" in n
    }
    assert loaded.keys() == saved.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(loaded[name].detach().float(), weight, atol=1e-5, rtol=0)
    assert (output / "critic" / "critic.safetensors").is_file()
    assert (output / "tokenizer_config.json").is_file()


def test_resuming_goes_on_where_it_stopped(ppo, run):
    before = checkpoint(ppo)
    run("ppo", "fit", f"--ckpt_path={ppo}/checkpoints/last.ckpt", "--trainer.max_epochs=2")
    after = checkpoint(ppo)
    assert after["global_step"] == 2 * before["global_step"]


def test_a_folder_with_a_run_is_refused_and_can_be_overwritten(sft, run):
    with pytest.raises(ValueError, match=r"expected a folder without a run, got .*--overwrite=true"):
        run("sft", "fit")
    run("sft", "fit", folder="twice")
    run("sft", "fit", "--overwrite=true", folder="twice")
    assert not (run.root / "twice" / "checkpoints" / "last-v1.ckpt").exists()


def test_export_refuses_what_it_cannot_do(sft, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    last = f"--checkpoint={sft}/checkpoints/last.ckpt"
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        main(["export", last, f"--output={tmp_path}"])
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match="expected a checkpoint, got 'nowhere'"):
        main(["export", "--checkpoint=nowhere", f"--output={tmp_path / 'new'}"])
    hostile_helpers.checkpoint(tmp_path / "other.ckpt", stage=None)
    with pytest.raises(ValueError, match=r"expected a checkpoint of lit-vapo \(sft, reward or ppo\), got stage None"):
        main(["export", f"--checkpoint={tmp_path}/other.ckpt", f"--output={tmp_path / 'new'}"])


def test_checkpoint_of_another_stage_or_size_is_refused(sft, reward, run):
    with pytest.raises(ValueError, match="expected one of stage 'reward', got one of stage 'sft'"):
        run("reward", "test", f"--ckpt_path={sft}/checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="checkpoint of another architecture: expected head"):
        run(
            "reward",
            "test",
            f"--ckpt_path={reward}/checkpoints/last.ckpt",
            "--model.head.init_args.num_members=5",
        )


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("ppo", ["--model.kl_coef=-0.1"], "model.kl_coef: expected a number of 0 or more, got -0.1"),
        ("ppo", ["--model.learning_rate=0"], "model.learning_rate: expected a number above 0"),
        ("ppo", ["--model.reward=nowhere"], "expected a folder with ensemble.json"),
        (
            "ppo",
            ["--model.sampling.max_new_tokens=500"],
            "context of 128 tokens, got a sequence of 532",
        ),
        ("ppo", ["--data.max_prompt_length=3"], "line 1: expected a prompt of 1 … 3 tokens"),
        ("reward", ["--data.validation_fraction=2"], "data.validation_fraction: expected a number from 0"),
        ("reward", ["--model.base.path=./nowhere"], "expected a folder with a transformers model"),
        ("reward", ["--model.layer=9"], "layer: expected 1 … 2"),
        ("sft", ["--data.preferences=gone.jsonl"], "data.preferences: expected a file, got 'gone.jsonl'"),
    ],
)
def test_bad_settings_are_refused_before_training(run, reward, tmp_path, stage, options, message):
    with pytest.raises(ValueError, match=message):
        run(stage, "fit", *options, folder=tmp_path / "bad")
    assert not (tmp_path / "bad" / "checkpoints").exists()


def test_variance_needs_two_members(run, reward, tmp_path, tiny_model_dir):
    folder = run("reward", "fit", "--model.head.init_args.num_members=1", folder="single")
    main(["export", f"--checkpoint={folder}/checkpoints/last.ckpt", f"--output={run.root / 'one'}"])
    with pytest.raises(
        ValueError, match="VarianceAware needs the variance of an ensemble: expected at least 2 members"
    ):
        run("ppo", "fit", folder="unused", model__reward=run.root / "one")
    plain = "--model.objective=lit_vapo.objectives.mean_reward.MeanReward"
    # Its members were never calibrated: the ppo stage does it at the start.
    run("ppo", "fit", plain, folder="plain", model__reward=run.root / "one")


def test_unknown_key_is_named(run, capsys):
    with pytest.raises(SystemExit):
        run("reward", "fit", "--model.learningrate=1", folder="unknown")
    assert "model.learningrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}], "line 1: expected column 'rejected', got columns"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": 5, "rejected": "c"}],
            "line 2: ",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "line 1: expected two different responses"),
    ],
)
def test_bad_rows_are_named_before_training(run, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        run("reward", "fit", folder=tmp_path / "bad", data__preferences=write_jsonl(tmp_path / "bad.jsonl", rows))


def test_conversations_need_a_chat_template(run, tmp_path):
    plain = tiny_model(tmp_path / "plain", tiny_tokenizer(tmp_path / "plain"))
    turn = [{"role": "user", "content": "a"}]
    rows = [{"prompt": turn, "chosen": w, "rejected": "z"} for w in "bc"]
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template for conversational data, got"):
        run(
            "reward",
            "fit",
            folder=tmp_path / "bad",
            data__tokenizer=plain,
            data__preferences=write_jsonl(tmp_path / "chat.jsonl", rows),
        )


def test_usage_and_unknown_stage(capsys):
    main([])
    assert "usage: lit-vapo STAGE COMMAND" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected a stage or command: sft, reward, ppo, .*, got 'dpo'"):
        main(["dpo", "fit"])


def test_a_class_beside_you_is_found(run, reward, tmp_path, monkeypatch):
    source = (
        "import torch\nfrom lit_vapo.objectives.base import Objective, Score\n\n\n"
        "class Median(Objective):\n    def forward(self, estimate):\n"
        "        reward = estimate.members.median(dim=1).values\n"
        "        return Score(reward, torch.ones_like(reward))\n"
    )
    (tmp_path / "my_own_objective.py").write_text(source)
    config = Path("configs/ppo/tiny.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    run("ppo", "fit", "--model.objective=my_own_objective.Median", folder="own", config=config)


def test_nothing_set_aside_for_validation(run, tmp_path):
    run("reward", "fit", "--data.validation_fraction=0", folder=tmp_path / "all")
    assert (tmp_path / "all" / "checkpoints" / "last.ckpt").is_file()


def test_the_last_checkpoint_is_the_last_step(run, reward):
    # A validation after the first of two iterations must not be the end of what is saved.
    folder = run("ppo", "fit", "--trainer.val_check_interval=2", "--trainer.limit_train_batches=3", folder="interval")
    assert checkpoint(folder)["global_step"] == json.loads((folder / "finished.json").read_text())["steps"] == 6


def test_predict_writes_its_responses(run, ppo):
    run("ppo", "predict", f"--ckpt_path={ppo}/checkpoints/last.ckpt")
    assert read_jsonl(ppo / "samples_predict.jsonl")
