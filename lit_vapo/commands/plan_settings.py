"""What `lit-vapo plan` takes from the settings of a stage, which it reads as the stage does."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from lit_vapo.advantages.gae import Gae
from lit_vapo.commands.run import StageCLI
from lit_vapo.commands.stages import STAGES
from lit_vapo.models.exported import check_policy, is_adapter
from lit_vapo.models.generation import Sampling
from lit_vapo.models.sharding import check_cut
from lit_vapo.plan.draft import Draft, Plan, Setup, planned
from lit_vapo.plan.ppo import PPOJob, draft_ppo
from lit_vapo.plan.reward import RewardJob, draft_reward
from lit_vapo.plan.sft import SFTJob, draft_sft
from lit_vapo.rewards import load_reward
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.stages.ppo.update import UpdateSettings, chosen_critic

SHARDED = ("fsdp2", "shardedstrategy")
EVERY = "every prompt and response is taken to be as long as it may be: most runs take less"


def chosen_stage(words: list[str]) -> tuple[str, list[str]]:
    """The stage that is meant, and its options: the first word, or the only one that takes all settings of the model.

    Raises:
        ValueError: It is not known, or several would do.
    """
    listed = ", ".join(STAGES)
    if words and not words[0].startswith("-"):
        if words[0] not in STAGES:
            raise ValueError(f"plan: expected a stage ({listed}) or options, got {words[0]!r}")
        return words[0], words[2:] if words[1:2] == ["fit"] else words[1:]
    given = _given(words)
    fitting = [name for name, stage in STAGES.items() if given <= inspect.signature(stage.load()).parameters.keys()]
    if len(fitting) != 1:
        raise ValueError(
            f"plan: expected the stage ({listed}) as the first word, since what is set of the model "
            f"({', '.join(sorted(given)) or 'nothing'}) fits {', '.join(fitting) or 'none'}"
        )
    return fitting[0], words


def _given(words: Sequence[str]) -> set[str]:
    """Which settings of the model stand in the files and on the command line."""
    names, files = set(), []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, _, value = word.partition("=")
        if option == "--config":
            files.append(value or following)
        elif option.startswith("--model."):
            names.add(option.split(".")[1])
    for file in files:
        with open(file, encoding="utf-8") as text:
            model = (yaml.safe_load(text) or {}).get("model")
        names |= set(model) if isinstance(model, dict) else set()
    return names


class _Reader(StageCLI):
    """The options of a stage, read as the stage reads them; nothing is made of them that reads a model."""

    def _set_seed(self) -> None:
        """No number is drawn."""

    def before_instantiate_classes(self) -> None:
        """No folder is claimed or looked at."""

    def instantiate_classes(self) -> None:
        """Make what the model's options name, and none of the rest."""
        config, parser = self.config["fit"], self._parser("fit")
        self.trainer_settings = config.pop("trainer")
        self.notes = [EVERY]
        if config["model"].get("gold") is not None:
            config["model"]["gold"] = None
            self.notes.append("the gold judge is not counted")
        for kind in (self._model_class, self._datamodule_class):
            parser.add_instantiator(_arguments, kind, subclasses=False, prepend=True)
        made = parser.instantiate_classes(config)
        self.model_settings, self.data_settings = made["model"], made["data"]

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def _arguments(kind: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    kwargs.pop("applied_instantiation_links", None)
    return kwargs


@dataclass
class Settings:
    """A run as far as a plan needs to know it.

    Args:
        stage: The stage.
        job: Its settings.
        setup: Where it runs.
        notes: What a reader should know.
    """

    stage: str
    job: PPOJob | RewardJob | SFTJob
    setup: Setup
    notes: list[str]

    def draft(self) -> Draft:
        """What it takes of one device that has all to itself."""
        if isinstance(self.job, PPOJob):
            return draft_ppo(self.job, self.setup)
        if isinstance(self.job, RewardJob):
            return draft_reward(self.job, self.setup)
        return draft_sft(self.job, self.setup)

    def plan(self) -> Plan:
        """What each device takes."""
        draft = self.draft()
        draft.notes = [*self.notes, *draft.notes]
        return planned(draft, self.setup)

    @property
    def title(self) -> str:
        """The run in a line."""
        setup, base = self.setup, self.job.base
        held = base.quantization or base.dtype
        shared = f", {setup.devices} devices, {'FSDP2' if setup.sharded else 'DDP'}" if setup.devices > 1 else ""
        return f"{self.stage} of {base.path} ({held}), {setup.precision}{shared}"


def read_settings(
    stage: str, words: Sequence[str], devices: int | None = None, strategy: str | None = None, on_cpu: bool = False
) -> Settings:
    """The settings of `lit-vapo STAGE fit WORDS`.

    Args:
        stage: The stage.
        words: Its options.
        devices: In place of the trainer's.
        strategy: `ddp` or `fsdp2`, in place of the trainer's.
        on_cpu: For a CPU.

    Raises:
        ValueError: They are refused.
    """
    kind = STAGES[stage]
    read = _Reader(kind.load(), kind.data, stage=stage, args=["fit", *words])
    trainer = read.trainer_settings
    count = _count(trainer, devices)
    named = str(strategy or _name(trainer.get("strategy"))).lower()
    sharded = any(word in named for word in SHARDED) and count > 1
    setup = Setup(count, sharded, str(trainer.get("precision") or "32-true"), on_cpu)
    if read.model_settings["optimizer"] != "adamw":
        read.notes.append("the optimiser is planned as AdamW, with two numbers for each trained weight")
    job = JOBS[stage](read.model_settings, read.data_settings, read.notes)
    if sharded:
        check_cut(job.base)
    return Settings(stage, job, setup, read.notes)


def _name(strategy: Any) -> str:
    """What a strategy is called, by name or by class."""
    return str(getattr(strategy, "class_path", None) or strategy)


def _count(trainer: Any, devices: int | None) -> int:
    given = devices if devices is not None else trainer.get("devices")
    count = len(given) if isinstance(given, list) else int(given) if str(given).lstrip("-").isdigit() else 1
    if devices is not None and count < 1:
        raise ValueError(f"--devices: expected at least 1, got {devices}")
    if count < 1:
        raise ValueError("--devices: expected how many there are, since trainer.devices asks for all, got none")
    return count * (1 if devices is not None else int(trainer.get("num_nodes") or 1))


def _ppo(model: dict[str, Any], data: dict[str, Any], notes: list[str]) -> PPOJob:
    base, policy, lora = model["base"], model["policy"], model["lora"]
    if policy is not None:
        lora = check_policy(policy, base, lora)
    if model.get("generator") is not None:
        notes.append("generation is planned as transformers does it, on the same GPUs")
    sampling, update = model["sampling"] or Sampling(), model["update"] or UpdateSettings()
    reward = model["reward"]
    if isinstance(reward, str):
        try:
            reward = load_reward(reward, model["trust"])
        except ValueError:
            notes.append(f"no rewards in {reward} yet: taken for heads on the policy's base, which take little")
            reward = None
    critic = chosen_critic(model["critic"], model["advantage"] or Gae(), update)
    return PPOJob(
        base=base,
        lora=lora,
        critic=critic,
        reward=reward,
        policy=policy if policy is not None and not is_adapter(policy) else None,
        prompts=data["batch_size"],
        responses=sampling.num_responses,
        prompt_length=data["max_prompt_length"],
        new=sampling.max_new_tokens,
        epochs=update.epochs,
        minibatches=min(update.minibatches, data["batch_size"] * sampling.num_responses),
        micro_batch_tokens=update.micro_batch_tokens,
        averaged=model["ema_decay"] is not None,
    )


def _reward(model: dict[str, Any], data: dict[str, Any], notes: list[str]) -> RewardJob:
    head = model["head"] or HeadEnsemble()
    head.check_backbone(model["base"].quantization, model["freeze_backbone"])
    if model["member"] is not None:
        head.select(model["member"])
    return RewardJob(
        base=model["base"],
        head=head,
        layer=None if model["layer"] == "auto" else model["layer"],
        pooling=model["pooling"],
        frozen=model["freeze_backbone"],
        reference=model["base"] if model["reference"] == "base" else model["reference"],
        sampling=model["reference_sampling"] or Sampling(),
        num_reference=model["num_reference"],
        pairs=data["batch_size"],
        length=data["max_length"],
        prompt_length=data["max_prompt_length"],
    )


def _sft(model: dict[str, Any], data: dict[str, Any], notes: list[str]) -> SFTJob:
    return SFTJob(model["base"], model["lora"], data["batch_size"], data["max_length"])


JOBS: dict[str, Any] = {"ppo": _ppo, "reward": _reward, "sft": _sft}
