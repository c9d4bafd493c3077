"""Sources of rewards as commands take them: by folder or by class, ready to score."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lit_vapo.data.conversation import last_answer
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.models.pretrained import check_tokenizer
from lit_vapo.rewards import EnsembleReward, Responses, RewardSource, load_reward
from lit_vapo.rewards.protocol import Row
from lit_vapo.rollout import Encoders, text_responses, token_responses
from lit_vapo.types import TokenSequence


def chosen_source(
    reward: RewardSource | str | None, ensemble: str | None, trust: list[str] | None = None
) -> RewardSource:
    """The source that a command is given.

    Args:
        reward: A folder, or a source.
        ensemble: The folder, by the other option's name.
        trust: Code that a folder may run.

    Raises:
        ValueError: Neither or both are given, or there is no such source.
    """
    if (reward is None) == (ensemble is None):
        raise ValueError(
            "--reward: expected the folder of an ensemble or of public reward models, or a source, got "
            + ("none" if reward is None else "one beside --ensemble")
        )
    given = reward if ensemble is None else ensemble
    return load_reward(given, trust) if isinstance(given, str) else given  # type: ignore[return-value]


def device_of() -> torch.device:
    """Where commands compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ready(source: RewardSource, device: torch.device) -> RewardSource:
    """A source with all it needs in memory, on its device."""
    source.check()
    source.prepare(None)
    return source.to(device).eval()


def warn_of_units(source: RewardSource) -> None:
    """Say where a source's members are not centred and scaled."""
    if not source.calibrated:
        print("WARNING: members are not centred and scaled; `lit-vapo reward calibrate` does it", file=sys.stderr)


@torch.no_grad()
def opinions(source: RewardSource, responses: Responses) -> list[dict[str, Any]]:
    """What a source says of each response, as plain numbers.

    Returns:
        `reward`, `sigma` (of several members) and `members` (where there are any) of each; `None` each where the source
        says nothing.
    """
    found = source.score(responses)
    known = (~found.missing & found.mean.isfinite()).tolist()
    count = len(responses)
    told = {
        "reward": found.mean.tolist(),
        "sigma": found.variance.clamp_min(0).sqrt().tolist() if source.num_members > 1 else [None] * count,
        "members": [None] * count if found.members is None else found.members.tolist(),
    }
    return [{name: values[i] if known[i] else None for name, values in told.items()} for i in range(count)]


def row_responses(rows: Sequence[Row], encoders: Encoders, columns: Mapping[str, list[Any]] | None = None) -> Responses:
    """What rows of JSON ask about, as responses to score.

    Args:
        rows: The rows.
        encoders: Writes responses down for models.
        columns: Further columns by name, a value for each row.
    """
    asked, texts, ended = [r.asked() for r in rows], [r.response for r in rows], [r.finished for r in rows]
    return text_responses(asked, texts, ended, encoders, device_of(), columns)


def check_tokens(source: RewardSource, data: PreferenceDataModule) -> None:
    """Refuse data of another tokenizer for an ensemble, which is judged on the very tokens that it would train on.

    Raises:
        ValueError: The vocabularies differ.
    """
    if isinstance(source, EnsembleReward):
        check_tokenizer(data.text_tokenizer, source.base, "--data.tokenizer")


def pair_responses(
    data: PreferenceDataModule, rows: Sequence[dict[str, Any]], encoders: Encoders, device: torch.device
) -> Responses:
    """Both sides of N pairs as 2N responses, the chosen ones first.

    Args:
        data: Where they are from; `keep_texts` was called before its rows were read.
        rows: The pairs.
        encoders: Writes responses down for other models.
        device: Where estimates are wanted.

    Raises:
        ValueError: An answer ends with something that is no text.
    """
    sides, answers = [], []
    for name in ("chosen", "rejected"):
        for row in rows:
            preference = row["preference"]
            answers.append(last_answer(preference.prompt, getattr(preference, name), row["place"]))
            sides.append(TokenSequence(row[f"{name}_ids"], row["prompt_length"]))
    prompts, texts = zip(*answers, strict=True)
    tokenizer = data.text_tokenizer
    return token_responses(
        list(prompts), sides, [True] * len(sides), tokenizer, len(tokenizer), encoders, device, list(texts)
    )
