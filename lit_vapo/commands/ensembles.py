"""What is done to a finished ensemble: join members, centre and scale them anew, look at where they disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_vapo.commands.sources import check_tokens, chosen_source, device_of, pair_responses, ready
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.evaluation.preference_files import write_scores
from lit_vapo.figures import member_scores, sigma_histogram
from lit_vapo.folders import check_new, new_folder
from lit_vapo.models.digests import check_sealed, copy_sealed, seal
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained, check_tokenizer, load_causal_lm, place
from lit_vapo.models.tensors import read_tensors
from lit_vapo.rewards import RewardSource
from lit_vapo.rewards.ensemble_file import WEIGHTS_NAME, read_config, write_config
from lit_vapo.rewards.normaliser import Normaliser
from lit_vapo.rollout import Encoders, reference_responses
from lit_vapo.stages.seeding import seeded
from lit_vapo.types import RewardEstimate


def join(members: list[str], output: str) -> None:
    """Make one ensemble of members that were trained in runs of their own (`model.member`).

    Args:
        members: Folders of the exported members, in any order.
        output: A new or empty folder for the ensemble.

    Raises:
        ValueError: Fewer than two members, one missing or given twice, or members of different models or settings.
        FileExistsError: The output has files in it.
    """
    if len(members) < 2:
        raise ValueError(f"--members: expected at least 2 folders, got {len(members)}")
    configs = [read_config(folder) for folder in members]
    first, found = configs[0], dict[int, Path]()
    for folder, config in zip(members, configs, strict=True):
        for name in ("spec", "head", "hidden_size"):
            got, expected = getattr(config, name), getattr(first, name)
            if got != expected:
                raise ValueError(f"{folder}: expected {name} as in {members[0]}, {expected}, got {got}")
        for k in config.members:
            if k in found:
                raise ValueError(f"{folder}: expected each member once, got member {k} here and in {found[k]}")
            found[k] = Path(folder)
    count = first.num_members
    missing = sorted(set(range(count)) - set(found))
    if missing:
        raise ValueError(f"--members: expected all {count} members, got none for {missing}")
    for k, source in found.items():
        if not (source / f"member_{k}" / "config.json").is_file():
            raise ValueError(f"{source}: expected the model of member {k} in member_{k}, got none")
    with new_folder(output, "--output") as target:
        for k, source in found.items():
            copy_sealed(source, target, f"member_{k}")
            check_sealed(source, WEIGHTS_NAME)
        save_file(_join_heads([read_tensors(found[k] / WEIGHTS_NAME) for k in range(count)]), target / WEIGHTS_NAME)
        write_config(target, first.model_copy(update={"members": list(range(count))}))
        seal(target)
    print(f"joined {count} members to {output}; `lit-vapo reward calibrate` or the start of PPO makes them comparable")


def _join_heads(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Row k of what each member has a row of, from the file of member k."""
    joined = {}
    for name, value in weights[0].items():
        each = value.ndim > 0 and value.shape[0] == len(weights)
        joined[name] = torch.stack([w[name][k] for k, w in enumerate(weights)]) if each else value
    # The members' typical variance takes all of them: it is fixed where they are calibrated together.
    joined["calibrated"] = torch.zeros_like(joined["calibrated"])
    return joined


def calibrate(
    output: str,
    reference: Pretrained,
    data: PreferenceDataModule,
    reward: RewardSource | str | None = None,
    ensemble: str | None = None,
    sampling: Sampling | None = None,
    num_reference: int = 256,
    seed: int = 0,
    trust: list[str] | None = None,
) -> None:
    """Centre and scale the members anew, on responses of a reference policy to the prompts of `data`.

    Args:
        output: A new or empty folder for the rewards with their new normalisation.
        reference: The reference policy.
        data: Where the prompts come from, as in the stages.
        reward: Folder of an ensemble or of public reward models, which stays as it is; or public reward models
            (`PretrainedRewards`), for which this writes a first folder.
        ensemble: Another name of `reward`, for a folder.
        sampling: How the reference responds; use what PPO will use.
        num_reference: How many prompts it responds to.
        seed: Seed of the responses.
        trust: Code outside of lit_vapo that the folder may run: classes by their Python name, models that bring code
            by folder or hub name.

    Raises:
        FileExistsError: The output has files in it.
        ValueError: There is no such source, or none that a folder can hold.
    """
    check_new(output, "--output")
    source = chosen_source(reward, ensemble, trust)
    if type(source).save_pretrained is RewardSource.save_pretrained:
        source.save_pretrained(output)  # says why it cannot
    source = ready(source, device_of())
    check_tokens(source, data)
    check_tokenizer(data.text_tokenizer, reference, "--reference")
    lm = place(load_causal_lm(reference, "--reference.path"), device_of())
    with seeded(seed):
        batches = data.prompt_batches("train", num_reference)
        responses = reference_responses(lm, data.text_tokenizer, batches, sampling or Sampling())
    normalisers = [module for module in source.modules() if isinstance(module, Normaliser)]
    before = [normaliser.reward_scale.clone() for normaliser in normalisers]
    source.calibrate([responses])
    with new_folder(output, "--output") as target:
        source.save_pretrained(target)
    scales = zip(normalisers, before, strict=True)
    change = [x for normaliser, old in scales for x in (normaliser.reward_scale / old).tolist()]
    print(f"calibrated on {len(responses)} responses of {reference.path}; written to {output}")
    print("each member's unit, new / old: " + ", ".join(f"{x:.3f}" for x in change))


def disagreement(
    output: str,
    data: PreferenceDataModule,
    reward: RewardSource | str | None = None,
    ensemble: str | None = None,
    pairs: list[int] | None = None,
    split: Literal["train", "val", "test", "ood"] = "val",
    max_pairs: int = 500,
    trust: list[str] | None = None,
) -> None:
    """Draw the scores of all members on a few responses, and the distribution of σ over a data set.

    Writes `members.png` (chosen and rejected response of each pair, a dot a member), `sigma.png`, and the figures
    behind them as `scores.csv` and `disagreement.json`.

    Args:
        output: A new or empty folder for the pictures.
        data: Preferences, as in the reward stage.
        reward: Folder of an ensemble or of public reward models, or a source of rewards.
        ensemble: Another name of `reward`, for a folder.
        pairs: Numbers of the pairs to draw, in the split's order; `null` draws four with a small, four with a large σ.
        split: `train`, `val`, `test` or `ood`.
        max_pairs: Most pairs to score.
        trust: Code outside of lit_vapo that the folder may run, as in `calibrate`.

    Raises:
        ValueError: The source has fewer than two members, or there is no such pair.
        FileExistsError: The output has files in it.
    """
    check_new(output, "--output")
    source = chosen_source(reward, ensemble, trust)
    if source.num_members < 2:
        option = "--reward" if ensemble is None else "--ensemble"
        raise ValueError(f"{option}: expected at least 2 members to disagree, got {source.num_members}")
    if max_pairs < 1:
        raise ValueError(f"--max_pairs: expected at least 1, got {max_pairs}")
    data.keep_texts()
    rows = data.preference_rows(split)[:max_pairs]
    if not rows:
        raise ValueError(f"--split: expected one with pairs, got {split!r}, which has none")
    for number in pairs or []:
        if not 0 <= number < len(rows):
            raise ValueError(f"--pairs: expected numbers 0 … {len(rows) - 1}, got {number}")
    source = ready(source, device_of())
    check_tokens(source, data)
    with torch.no_grad():
        estimate = source.estimate(pair_responses(data, rows, Encoders(), device_of()))
    if estimate.members is None:
        raise ValueError(f"--reward: expected separate members to draw, got {type(source).__name__}")
    members = estimate.members.cpu()
    estimate = RewardEstimate(estimate.mean.cpu(), estimate.variance.cpu(), members)
    sigma = estimate.sigma
    order = sigma.view(2, -1).mean(0).argsort().tolist()
    drawn = pairs or list(dict.fromkeys([*order[:4], *order[-4:]]))
    index = [i for number in drawn for i in (number, number + len(rows))]
    # As they were cut for training, without what ends them.
    texts = [_response(data, r[side], r["prompt_length"]) for side in ("chosen_ids", "rejected_ids") for r in rows]
    sides = ["chosen"] * len(rows) + ["rejected"] * len(rows)
    with new_folder(output, "--output") as target:
        labels = [f"[{sides[i]}] {texts[i]}" for i in index]
        member_scores(members[index], labels, target / "members.png", unit=source.unit)
        sigma_histogram(sigma, target / "sigma.png", unit=source.unit)
        write_scores(target / "scores.csv", estimate, [row["place"] for row in rows] * 2, sides, texts)
        summary = {"num_responses": len(texts), **_quantiles(sigma), "pairs": drawn}
        (target / "disagreement.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"mean σ {float(sigma.mean()):.3f} ({source.unit}) over {len(texts)} responses; pictures in {output}")


def _quantiles(sigma: Tensor) -> dict[str, Any]:
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    values = sigma.quantile(torch.tensor(shares)).tolist()
    return {"sigma_mean": float(sigma.mean()), "sigma_quantiles": dict(zip(map(str, shares), values, strict=True))}


def _response(data: PreferenceDataModule, ids: list[int], start: int) -> str:
    return str(data.text_tokenizer.decode(ids[start:], skip_special_tokens=True))
