"""What options of TRL's trainers are here: one table, from which `lit-vapo convert trl` and its page come.

Names and defaults are those of TRL 1.12.0: of `PPOConfig`, `GRPOConfig`, `RewardConfig`, `ModelConfig` and
`ScriptArguments`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]
# What a rule writes: keys of ours, dotted, with their values.
Written = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """What becomes of one option.

    Args:
        key: Ours, dotted; empty where `write` says which, or where there is none.
        note: What is other here than there, one sentence.
        write: What to write, from the value and all settings; the value under `key` without.
        default: TRL's default, to be written where a file says nothing; only where ours is another and it matters.
    """

    key: str = ""
    note: str = ""
    write: Callable[[Any, Settings], Written] | None = None
    default: Any = None

    def __call__(self, value: Any, settings: Settings) -> Written:
        """Our keys and their values."""
        return {self.key: value} if self.write is None else self.write(value, settings)


def _fixed(key: str, wanted: Any, given: Any) -> Callable[[Any, Settings], Written]:
    """A value of ours for one of theirs, nothing for all others."""
    return lambda value, _: {key: wanted} if value == given else {}


def _both(*keys: str) -> Callable[[Any, Settings], Written]:
    """The same value under several keys."""
    return lambda value, _: dict.fromkeys(keys, value)


def _adapters(value: Any, settings: Settings) -> Written:
    if not value:
        return {}
    found = {"rank": settings.get("lora_r", 16), "alpha": float(settings.get("lora_alpha", 32))}
    if settings.get("lora_target_modules"):
        found["target_modules"] = settings["lora_target_modules"]
    return {"model.lora": found}


def _members(value: Any, settings: Settings) -> Written:
    """In the reward stage adapters belong to members."""
    if not value:
        return {}
    lora = _adapters(value, settings)["model.lora"]
    return {"model.head.class_path": "LoraEnsemble", **{f"model.head.init_args.{k}": v for k, v in lora.items()}}


def _responses(settings: Settings) -> int:
    """Completions of one generation on one device."""
    batch = int(settings.get("per_device_train_batch_size", 8))
    return batch * int(settings.get("steps_per_generation") or settings.get("gradient_accumulation_steps", 1))


def _prompts(value: Any, settings: Settings) -> Written:
    """GRPO counts completions, ours counts prompts."""
    count = int(settings.get("num_generations", 8))
    return {"data.batch_size": max(1, _responses(settings) // count)}


def _ppo_batch(value: Any, settings: Settings) -> Written:
    return {"data.batch_size": int(value) * int(settings.get("gradient_accumulation_steps", 1))}


def _episodes(value: Any, settings: Settings) -> Written:
    batch = _ppo_batch(settings.get("per_device_train_batch_size", 8), settings)["data.batch_size"]
    updates = int(settings.get("num_ppo_epochs", 4)) * int(settings.get("num_mini_batches", 1))
    return {"trainer.max_steps": max(1, int(value) // batch) * updates, "trainer.max_epochs": -1}


def _dataset(key: str) -> Callable[[Any, Settings], Written]:
    def write(value: Any, settings: Settings) -> Written:
        config, split = settings.get("dataset_config"), settings.get("dataset_train_split", "train")
        plain = config is None and split == "train"
        return {f"data.{key}": value if plain else f"{value}:{config or ''}:{split}"}

    return write


def _stop(value: Any, settings: Settings) -> Written:
    # `eos` ends responses here anyway.
    return {"model.sampling.stop_token_ids": [int(value)]} if value is not None else {}


def _scaled(value: Any, settings: Settings) -> Written:
    if settings.get("multi_objective_aggregation") == "normalize_then_sum":
        return {"model.advantage.class_path": "Gdpo"}
    return {"model.advantage.class_path": "Rloo" if value in (False, "none") else "Grpo"}


MODEL = {
    "model_name_or_path": Rule(write=_both("model.base.path", "data.tokenizer")),
    "model_revision": Rule(write=lambda value, _: {} if value == "main" else {"model.base.revision": value}),
    "dtype": Rule("model.base.dtype"),
    "attn_implementation": Rule("model.base.attn_implementation"),
    "trust_remote_code": Rule(write=lambda value, _: {"model.base.trust_remote_code": True} if value else {}),
    "load_in_8bit": Rule(write=_fixed("model.base.quantization", "8bit", True)),
    "load_in_4bit": Rule(write=_fixed("model.base.quantization", "4bit", True), note="nf4, as there by default."),
    "use_peft": Rule(write=_adapters, note="With `lora_r`, `lora_alpha`, `lora_target_modules`; no dropout."),
    "gradient_checkpointing": Rule("model.base.gradient_checkpointing"),
}
RUN = {
    "output_dir": Rule("trainer.default_root_dir"),
    "seed": Rule("seed_everything"),
    "num_train_epochs": Rule(
        # Where both are given, the number of episodes wins there, too.
        write=lambda value, settings: (
            {} if settings.get("total_episodes") else {"trainer.max_epochs": round(float(value))}
        ),
    ),
    "logging_steps": Rule("trainer.log_every_n_steps"),
    "bf16": Rule(write=_fixed("trainer.precision", "bf16-mixed", True)),
    "use_cpu": Rule(write=_fixed("trainer.accelerator", "cpu", True)),
    "dataloader_num_workers": Rule("data.num_workers"),
    "chat_template_kwargs": Rule("data.chat_template_kwargs"),
}
POLICY = {
    "temperature": Rule("model.sampling.temperature"),
    "max_grad_norm": Rule("model.update.max_grad_norm"),
    "entropy_coef": Rule("model.update.entropy_coef"),
    "dataset_name": Rule(write=_dataset("prompts")),
}
PPO = (
    MODEL
    | RUN
    | POLICY
    | {
        "model_name_or_path": Rule(
            # Their script takes the tokenizer from there, and the policy from the next.
            write=lambda value, settings: (
                {"data.tokenizer": value} | ({} if settings.get("sft_model_path") else {"model.base.path": value})
            )
        ),
        "sft_model_path": Rule(
            write=lambda value, settings: (
                {"model.base.path": value} | ({} if settings.get("model_name_or_path") else {"data.tokenizer": value})
            ),
            note="Policy and reference start there.",
        ),
        "reward_model_path": Rule(
            write=lambda value, _: {
                "model.reward.class_path": "PretrainedRewards",
                "model.reward.init_args.models": [{"path": value}],
                "model.objective.class_path": "SingleReward",
            },
            note="One reward model. With an ensemble, or several, leave `model.objective` out.",
        ),
        "learning_rate": Rule(
            write=_both("model.learning_rate", "model.critic_learning_rate"),
            note="One rate for policy and value model. The critic on the reference bears ten times as much.",
            default=3e-6,
        ),
        "per_device_train_batch_size": Rule(
            write=_ppo_batch,
            note="Times `gradient_accumulation_steps`: the prompts of a rollout on one device.",
            default=8,
        ),
        "total_episodes": Rule(write=_episodes, note="As weight updates: episodes / prompts · epochs · minibatches."),
        "response_length": Rule("model.sampling.max_new_tokens", default=53),
        "temperature": Rule("model.sampling.temperature", default=0.7),
        "stop_token_id": Rule(write=_stop),
        "missing_eos_penalty": Rule(
            write=lambda value, _: {} if value is None else {"model.missing_eos_penalty": value}
        ),
        "num_ppo_epochs": Rule("model.update.epochs", default=4),
        "num_mini_batches": Rule("model.update.minibatches", default=1),
        "kl_coef": Rule("model.kl_coef", note="The price of the weighted KL, where the objective has a weight."),
        "kl_estimator": Rule(write=lambda value, _: {}, note="Always k1; k3 in a reward has another gradient."),
        "cliprange": Rule("model.update.clip_range"),
        "cliprange_value": Rule("model.update.value_clip_range"),
        "vf_coef": Rule("model.update.value_coef"),
        "gamma": Rule(write=lambda v, _: _gae(gamma=v)),
        "lam": Rule(write=lambda v, _: _gae(gae_lambda=v)),
    }
)
GRPO = (
    MODEL
    | RUN
    | POLICY
    | {
        "learning_rate": Rule("model.learning_rate", default=1e-6),
        "per_device_train_batch_size": Rule(
            write=_prompts,
            note="Completions there. Prompts here: times the steps of a generation, over `num_generations`.",
            default=8,
        ),
        "num_generations": Rule("model.sampling.num_responses", default=8),
        "max_completion_length": Rule("model.sampling.max_new_tokens", default=512),
        "num_iterations": Rule("model.update.epochs", default=1),
        "beta": Rule("model.kl_coef", note="There a term of the loss (k3), here in the reward.", default=0.0),
        "epsilon": Rule("model.update.clip_range"),
        "scale_rewards": Rule(
            write=_scaled,
            note="`group` is `Grpo`, none is `Rloo`; with `normalize_then_sum` it is `Gdpo`.",
            default="group",
        ),
        "vllm_importance_sampling_cap": Rule("model.update.sampler_ratio_cap"),
    }
)
REWARD = (
    MODEL
    | RUN
    | {
        "use_peft": Rule(
            write=_members,
            note="Adapters are the members' (`LoraEnsemble`). Without, members are heads on a frozen base.",
        ),
        "learning_rate": Rule(
            write=lambda value, settings: {
                "model.learning_rate" if settings.get("use_peft") else "model.backbone_learning_rate": value
            },
            note="Of adapters. Of whole models it counts where these train (configs/estimator/full_ensemble.yaml).",
        ),
        "per_device_train_batch_size": Rule("data.batch_size", default=8),
        "gradient_accumulation_steps": Rule("trainer.accumulate_grad_batches"),
        "max_grad_norm": Rule("trainer.gradient_clip_val"),
        "max_steps": Rule(write=lambda value, _: {"trainer.max_steps": value} if int(value) > 0 else {}),
        "weight_decay": Rule("model.weight_decay"),
        "max_length": Rule("data.max_length"),
        "dataset_name": Rule(write=_dataset("preferences")),
        "center_rewards_coefficient": Rule(
            write=lambda value, settings: (
                {}
                if value is None
                else {
                    "model.head.class_path": "LoraEnsemble" if settings.get("use_peft") else "HeadEnsemble",
                    "model.head.init_args.centering": value,
                }
            )
        ),
    }
)


def _gae(**given: float) -> Written:
    return {"model.advantage.class_path": "Gae"} | {f"model.advantage.init_args.{k}": v for k, v in given.items()}


# Options that others above read, and so are no loss.
READ_WITH_OTHERS = frozenset(
    {
        "lora_r",
        "lora_alpha",
        "lora_target_modules",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "dataset_config",
        "dataset_train_split",
        "dataset_test_split",
        "multi_objective_aggregation",
        "stop_token",
    }
)
# What a run does anyway, by an option of the command line, or by another file.
ELSEWHERE = {
    "report_to": "W&B: --config configs/logger/wandb.yaml; every run writes metrics.csv",
    "resume_from_checkpoint": "--resume goes on exactly where a run stopped",
    "save_steps": "a run saves at validations, at signals and at its end",
    "save_strategy": "a run saves at validations, at signals and at its end",
    "save_total_limit": "the last checkpoint and the best one are kept",
    "eval_strategy": "trainer.val_check_interval, in batches",
    "eval_steps": "trainer.val_check_interval, in batches",
    "deepspeed": "--trainer configs/trainer/fsdp2.yaml, or any strategy of Lightning",
    "fsdp": "--trainer configs/trainer/fsdp2.yaml",
    "fsdp_config": "--trainer configs/trainer/fsdp2.yaml",
    "fp16": "bf16-mixed, or float32: a loss scaler belongs to one step a batch",
    "use_vllm": "--config configs/generator/vllm.yaml",
    "reward_funcs": "model.reward: FunctionReward or WeightedSum (docs/rewards.md)",
    "reward_weights": "model.reward: WeightedSum (docs/rewards.md)",
    "top_p": "always 1: the log-probabilities of PPO are those of the tokens as drawn",
    "top_k": "always off, as top_p",
    "min_p": "always off, as top_p",
    "repetition_penalty": "always off, as top_p",
    "push_to_hub": "lit-vapo export writes a folder with a model card; huggingface_hub uploads it",
}
