"""`lit-vapo convert trl`: what is written is a configuration of ours, and what has no counterpart is named."""

from pathlib import Path

import pytest
import yaml

from lit_vapo.cli import main
from lit_vapo.commands.convert import KINDS, convert
from lit_vapo.commands.trl_rules import ELSEWHERE

PAGE = Path(__file__).parents[1] / "docs" / "from_trl.md"
# A value for each option that there are rules for, other than TRL's default.
VALUES = {
    "model_name_or_path": "my/model",
    "model_revision": "v2",
    "dtype": "bfloat16",
    "attn_implementation": "sdpa",
    "trust_remote_code": True,
    "load_in_8bit": True,
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
    "gradient_checkpointing": True,
    "output_dir": "out",
    "seed": 3,
    "num_train_epochs": 2.0,
    "logging_steps": 5,
    "bf16": True,
    "use_cpu": True,
    "dataloader_num_workers": 1,
    "chat_template_kwargs": {"enable_thinking": False},
    "learning_rate": 2e-5,
    "temperature": 0.9,
    "max_grad_norm": 0.5,
    "entropy_coef": 0.01,
    "dataset_name": "someone/texts",
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "sft_model_path": "my/sft",
    "reward_model_path": "my/reward",
    "total_episodes": 3200,
    "response_length": 40,
    "stop_token_id": 7,
    "missing_eos_penalty": 1.5,
    "num_ppo_epochs": 3,
    "num_mini_batches": 2,
    "kl_coef": 0.1,
    "kl_estimator": "k1",
    "cliprange": 0.3,
    "cliprange_value": 0.25,
    "vf_coef": 0.2,
    "gamma": 0.99,
    "lam": 0.9,
    "num_generations": 4,
    "max_completion_length": 50,
    "num_iterations": 2,
    "beta": 0.04,
    "epsilon": 0.15,
    "scale_rewards": "group",
    "vllm_importance_sampling_cap": 3.0,
    "max_steps": 100,
    "weight_decay": 0.1,
    "max_length": 128,
    "center_rewards_coefficient": 0.01,
}


def options(kind):
    more = ("lora_r", "lora_alpha", "lora_target_modules", "gradient_accumulation_steps")
    return {name: VALUES[name] for name in (*KINDS[kind].rules, *more) if name in VALUES}


@pytest.fixture
def converted(tmp_path):
    def call(given, *words):
        (tmp_path / "trl.yaml").write_text(yaml.safe_dump(given))
        main(["convert", "trl", str(tmp_path / "trl.yaml"), f"--output={tmp_path / 'ours.yaml'}", *words])
        return tmp_path / "ours.yaml"

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_there_is_a_rule_for_is_a_configuration_of_ours(kind, converted, capsys):
    given = options(kind)
    assert set(KINDS[kind].rules) - {"load_in_4bit"} <= set(given)
    file = converted(given, f"--kind={kind}")
    wanted = ["--data.prompts=x", "--model.reward=FOLDER"] if kind == "grpo" else []
    with pytest.raises(SystemExit) as ended:
        main([KINDS[kind].stage, "fit", f"--config={file}", *wanted, "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out.split("\n", 1)[1])
    model = printed["model"]
    assert model["base"] | {"quantization": "8bit", "dtype": "bfloat16", "revision": "v2"} == model["base"]
    assert printed["trainer"]["precision"] == "bf16-mixed"
    assert printed["seed_everything"] == 3


def test_ppo_by_hand():
    found = convert(dict(reversed(options("ppo").items())), KINDS["ppo"]).settings
    assert found["data"] == {
        "batch_size": 32,
        "tokenizer": "my/model",
        "num_workers": 1,
        "chat_template_kwargs": {"enable_thinking": False},
        "prompts": "someone/texts",
    }
    # 3,200 episodes in rollouts of 32, each of which 3 · 2 weight updates follow.
    assert found["trainer"]["max_steps"] == 600
    assert found["trainer"]["max_epochs"] == -1
    assert found["model"]["lora"] == {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}
    assert found["model"]["advantage"] == {"class_path": "Gae", "init_args": {"gamma": 0.99, "gae_lambda": 0.9}}


def test_the_page_has_all_of_it():
    text = PAGE.read_text()
    names = {name for kind in KINDS.values() for name in kind.rules} | ELSEWHERE.keys()
    assert sorted(name for name in names if f"`{name}`" not in text) == []


def test_grpo_counts_prompts_where_trl_counts_completions():
    found = convert({"per_device_train_batch_size": 16, "num_generations": 4, "steps_per_generation": 2}, KINDS["grpo"])
    assert found.settings["data"]["batch_size"] == 8
    for given, advantage in (({}, "Grpo"), ({"scale_rewards": False}, "Rloo"), ({"scale_rewards": "none"}, "Rloo")):
        assert convert(given, KINDS["grpo"]).settings["model"]["advantage"]["class_path"] == advantage
    both = {"scale_rewards": "group", "multi_objective_aggregation": "normalize_then_sum"}
    assert convert(both, KINDS["grpo"]).settings["model"]["advantage"]["class_path"] == "Gdpo"


def test_what_is_left_open_has_the_default_of_trl():
    found = convert({"kl_coef": 0.1}, KINDS["ppo"]).settings
    assert found["model"]["sampling"] == {"temperature": 0.7, "max_new_tokens": 53}
    assert found["model"]["learning_rate"] == 3e-6
    assert found["model"]["update"] == {"epochs": 4, "minibatches": 1}


def test_what_has_no_counterpart_is_named(converted):
    text = converted({"cliprange": 0.2, "whiten_rewards": True, "report_to": "wandb", "neverheard": 1}).read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    at = head.index("# No counterpart:")
    assert head[at + 1 :] == ["#   neverheard", "#   whiten_rewards"]
    assert f"#   report_to: {ELSEWHERE['report_to']}" in head
    assert any(line.endswith("--data.tokenizer MODEL --data.prompts FILE --model.reward FOLDER") for line in head)


def test_the_kind_is_told_by_its_own_options(converted, tmp_path):
    assert "PPOConfig" in converted({"num_ppo_epochs": 2}).read_text()
    (tmp_path / "ours.yaml").unlink()
    assert "GRPOConfig" in converted({"num_generations": 4}).read_text()
    (tmp_path / "ours.yaml").unlink()
    assert "RewardConfig" in converted({"center_rewards_coefficient": 0.1}).read_text()


def test_bad_input_is_refused(converted, tmp_path):
    with pytest.raises(ValueError, match="expected options of one of PPOConfig, GRPOConfig, RewardConfig, got none of"):
        converted({"learning_rate": 1e-5})
    with pytest.raises(ValueError, match="got those of PPOConfig and GRPOConfig; --kind says which"):
        converted({"vf_coef": 0.1, "beta": 0.1})
    with pytest.raises(ValueError, match="--kind: expected one of ppo, grpo, reward, got 'dpo'"):
        converted({}, "--kind=dpo")
    with pytest.raises(ValueError, match=r"trl\.yaml: expected options by name"):
        converted([1, 2])
    with pytest.raises(ValueError, match="expected a YAML file of options, got"):
        main(["convert", "trl", str(tmp_path / "none.yaml")])
    converted({"vf_coef": 0.1})
    with pytest.raises(FileExistsError, match="--output: expected a new file"):
        converted({"vf_coef": 0.1})


def test_without_an_output_it_is_printed(tmp_path, capsys):
    (tmp_path / "trl.yaml").write_text("vf_coef: 0.3\n")
    main(["convert", "trl", str(tmp_path / "trl.yaml")])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["update"]["value_coef"] == 0.3
