"""Model cards: what an exported folder is, how to load it, how it was made, and how good it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from lit_vapo.models.exported import is_adapter
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.stages.settings import plain

METRICS = "docs/metrics.md of lit-vapo"
POLICY = """\
# Policy aligned with lit-vapo

{what} of `{base}`, trained with {method} against {reward}. The reference of the KL penalty is
`{base}` itself.

## Use

```python
from transformers import AutoTokenizer, GenerationConfig
{imports}

folder = {folder}
model = {loader}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
# As the policy was sampled in training; of its settings the temperature and what ends a response matter.
settings = GenerationConfig.from_pretrained(folder)
print(tokenizer.decode(model.generate(**inputs, generation_config=settings, tokenizer=tokenizer)[0]))
```

In lit-vapo: `lit-vapo ppo test --config CONFIG --model.policy {folder_word}` evaluates it, and `fit` goes on
from it{critic}.
"""
ENSEMBLE = """\
# Ensemble of reward models

{members} member(s) of `{head}` on `{base}`, trained on preferences with lit-vapo. Scores are in standard deviations
over responses of the reference policy, if the ensemble was calibrated on one; their variance says where members
disagree.

## Use

```python
{code}
```
"""
SCORE = """\
import torch
from lit_vapo.rewards.reward_model import RewardModel

model = RewardModel.from_pretrained({folder})
tokenizer = model.load_tokenizer()
prompt, response = tokenizer("The film was")["input_ids"], tokenizer(" good", add_special_tokens=False)["input_ids"]
ids = torch.tensor([prompt + response])
score = model(ids, torch.tensor([ids.shape[1]]), torch.tensor([len(prompt)]))
print(score.mean, score.variance, score.members)"""
CLASSIFY = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
print(model(**tokenizer("The film was good", return_tensors="pt")).logits)  # one for each member"""


def policy_card(module: PPOModule, target: Path, folder: str) -> str:
    """The card of a policy.

    Args:
        module: The PPO module it was exported from.
        target: Where the export lies now.
        folder: Where it will lie, as the reader should name it.
    """
    settings = plain(dict(module.hparams))
    adapter = is_adapter(target)
    objective = type(module.objective).__name__
    advantage = type(module.advantage).__name__
    loader = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    text = POLICY.format(
        what="LoRA adapter" if adapter else "Whole model, a fine-tune",
        base=module.base.path,
        method=f"PPO (objective {objective}, advantage {advantage})",
        reward=_reward(settings["reward"]),
        imports=f"from {'peft' if adapter else 'transformers'} import {loader}",
        loader=loader,
        folder=json.dumps(folder),
        folder_word=folder,
        critic=", with the critic in `critic`" if (target / "critic").is_dir() else "",
    )
    table = {
        "objective": objective,
        "advantage": advantage,
        "KL coefficient at the end": f"{float(module.kl.coef):.6g}",
        "temperature": module.sampling.temperature,
        "longest response (tokens)": module.sampling.max_new_tokens,
        "learning rate, actor": module.learning_rate,
        "learning rate, critic": module.critic_learning_rate,
    }
    header = {
        "base_model": module.base.path,
        "base_model_relation": "adapter" if adapter else "finetune",
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lit-vapo", "rlhf", "ppo", objective, *(["lora"] if adapter else [])],
    }
    return _card(header, text, table, settings, module.figures)


def _reward(setting: Any) -> str:
    """Where rewards came from; the settings at the end of the card say the rest."""
    if isinstance(setting, str):
        return f"the reward ensemble `{setting}`"
    return f"rewards from `{setting['class_path'].rpartition('.')[2]}`"


def ensemble_card(module: RewardModule, folder: str, classifier: bool) -> str:
    """The card of a reward ensemble.

    Args:
        module: The reward module it was exported from.
        folder: Where the export will lie, as the reader should name it.
        classifier: It is a sequence classifier of transformers.
    """
    head = type(module.head).__name__
    text = ENSEMBLE.format(
        members=module.head.num_members,
        head=head,
        base=module.spec.base.path,
        code=(CLASSIFY if classifier else SCORE).format(folder=json.dumps(folder)),
    )
    header = {
        "base_model": module.spec.base.path,
        "library_name": "transformers" if classifier else "lit-vapo",
        "tags": ["lit-vapo", "rlhf", "reward-model", "ensemble", head],
    }
    table = {
        "estimator": head,
        "members": module.head.num_members,
        "pooling": module.spec.pooling,
        "layer": "last" if module.spec.layer is None else module.spec.layer,
        "calibrated": bool(module.head.calibrated),
        "learning rate": module.learning_rate,
    }
    return _card(header, text, table, plain(dict(module.hparams)), module.figures)


def _card(
    header: dict[str, Any], text: str, table: dict[str, Any], settings: dict[str, Any], figures: dict[str, float]
) -> str:
    front = yaml.safe_dump(header, sort_keys=False).strip()
    rows = "\n".join(f"| {key} | {value} |" for key, value in table.items())
    whole = yaml.safe_dump({k: v for k, v in settings.items() if not k.startswith("_")}, sort_keys=False).strip()
    return (
        f"---\n{front}\n---\n\n{text}\n## Configuration\n\n| setting | value |\n| --- | --- |\n{rows}\n\n"
        f"All of `model`:\n\n```yaml\n{whole}\n```\n\n## Figures\n\n{_figures(figures)}"
    )


def _figures(figures: dict[str, float]) -> str:
    """What the last evaluation said; without one, what training did."""
    evaluated = {k: v for k, v in figures.items() if k.startswith("val/")}
    shown = {k: v for k, v in sorted((evaluated or figures).items()) if math.isfinite(v)}
    if not shown:
        return "The checkpoint holds none.\n"
    whence = "the run's last evaluation on held-out data" if evaluated else "the run's last training step"
    rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in shown.items())
    return f"Of {whence}. {METRICS} defines them.\n\n| figure | value |\n| --- | --- |\n{rows}\n"
