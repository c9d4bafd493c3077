"""Model cards: what an exported folder is, how to load it, how it was made, and how good it was.

The text is in `templates/`; the header is that of the hub (`ModelCardData`), so that a folder can be pushed as it is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from lit_vapo.commands.markdown import block, cell, code
from lit_vapo.models.exported import is_adapter
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.stages.settings import plain

TEMPLATES = Path(__file__).with_name("templates")


def policy_card(module: PPOModule, target: Path, folder: str) -> ModelCard:
    """The card of a policy.

    Args:
        module: The PPO module it was exported from.
        target: Where the export lies now.
        folder: Where it will lie, as the reader should name it.
    """
    settings = plain(dict(module.hparams))
    adapter = is_adapter(target)
    objective, advantage = type(module.objective).__name__, type(module.advantage).__name__
    table = {
        "objective": objective,
        "advantage": advantage,
        "KL coefficient at the end": f"{float(module.kl.coef):.6g}",
        "temperature": module.sampling.temperature,
        "longest response (tokens)": module.sampling.max_new_tokens,
        "learning rate, actor": module.learning_rate,
        "learning rate, critic": module.critic_learning_rate,
        "average of weights, decay": module.ema_decay or "none",
    }
    header = ModelCardData(
        base_model=module.base.path,
        base_model_relation="adapter" if adapter else "finetune",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["lit-vapo", "rlhf", "ppo", objective, *(["lora"] if adapter else [])],
    )
    return ModelCard.from_template(
        header,
        template_path=str(TEMPLATES / "policy.md.j2"),
        adapter=adapter,
        base=code(module.base.path),
        objective=objective,
        advantage=advantage,
        reward=_reward(settings["reward"]),
        loader="AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM",
        command=code(f"lit-vapo ppo test --config CONFIG --model.policy {folder}"),
        quoted=json.dumps(folder),
        critic=(target / "critic").is_dir(),
        how_made=_how_made(table, settings, module.figures),
    )


def ensemble_card(module: RewardModule, folder: str, classifier: bool) -> ModelCard:
    """The card of a reward ensemble.

    Args:
        module: The reward module it was exported from.
        folder: Where the export will lie, as the reader should name it.
        classifier: It is a sequence classifier of transformers.
    """
    head = type(module.head).__name__
    table = {
        "estimator": head,
        "members": module.head.num_members,
        "pooling": module.spec.pooling,
        "layer": "last" if module.spec.layer is None else module.spec.layer,
        "calibrated": bool(module.head.calibrated),
        "learning rate": module.learning_rate,
    }
    header = ModelCardData(
        base_model=module.spec.base.path,
        library_name="transformers" if classifier else "lit-vapo",
        tags=["lit-vapo", "rlhf", "reward-model", "ensemble", head],
    )
    return ModelCard.from_template(
        header,
        template_path=str(TEMPLATES / "ensemble.md.j2"),
        members=module.head.num_members,
        head=head,
        base=code(module.spec.base.path),
        classifier=classifier,
        quoted=json.dumps(folder),
        how_made=_how_made(table, plain(dict(module.hparams)), module.figures),
    )


def _reward(setting: Any) -> str:
    """What a policy was trained against: a folder, or a source of rewards and the folder it was read from, if any."""
    if isinstance(setting, str):
        return f"rewards from {code(setting)}"
    name = setting["class_path"].rpartition(".")[2]
    folder = setting.get("init_args", {}).get("folder")
    return f"rewards from {code(name)}" + (f" in {code(folder)}" if folder else "")


def _how_made(table: dict[str, Any], settings: dict[str, Any], figures: dict[str, float]) -> str:
    """Settings, and the figures of the last evaluation; without one, those of training."""
    evaluated = {k: v for k, v in figures.items() if k.startswith("val/")}
    shown = {k: v for k, v in settings.items() if not k.startswith("_")}
    templates = Environment(loader=PackageLoader("lit_vapo.commands"), undefined=StrictUndefined)
    templates.filters["cell"] = cell
    return templates.get_template("how_made.md.j2").render(
        table=table,
        settings=block(yaml.safe_dump(shown, sort_keys=False).strip(), "yaml"),
        evaluated=bool(evaluated),
        figures={k: v for k, v in sorted((evaluated or figures).items()) if math.isfinite(v)},
    )
