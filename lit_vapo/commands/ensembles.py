"""What is done to a finished ensemble: join members, centre and scale them anew, look at where they disagree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.evaluation.preference_files import write_scores
from lit_vapo.figures import member_scores, sigma_histogram
from lit_vapo.folders import check_new, new_folder
from lit_vapo.models.digests import check_sealed, copy_sealed, seal
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained, check_tokenizer, load_causal_lm, place
from lit_vapo.models.tensors import read_tensors
from lit_vapo.rewards.ensemble_file import WEIGHTS_NAME, read_config, write_config
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.rollout import sample_references
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
    ensemble: str,
    output: str,
    reference: Pretrained,
    data: PreferenceDataModule,
    sampling: Sampling | None = None,
    num_reference: int = 256,
    seed: int = 0,
    trust: list[str] | None = None,
) -> None:
    """Centre and scale the members anew, on responses of a reference policy to the prompts of `data`.

    Args:
        ensemble: Folder of the ensemble; it stays as it is.
        output: A new or empty folder for the ensemble with its new normalisation.
        reference: The reference policy.
        data: Where the prompts come from, as in the stages.
        sampling: How the reference responds; use what PPO will use.
        num_reference: How many prompts it responds to.
        seed: Seed of the responses.
        trust: Code outside of lit_vapo that the ensemble may run: classes by their Python name, models that bring
            code by folder or hub name.

    Raises:
        FileExistsError: The output has files in it.
    """
    check_new(output, "--output")
    model = RewardModel.from_pretrained(ensemble, trust=trust)
    check_tokenizer(data.text_tokenizer, model.spec.base, "--data.tokenizer")
    check_tokenizer(data.text_tokenizer, reference, "--reference")
    lm = place(load_causal_lm(reference, "--reference.path"), _device())
    model = _on(model, lm.device)
    with seeded(seed):
        batches = data.prompt_batches("train", num_reference)
        sequences = sample_references(lm, data.text_tokenizer, batches, sampling or Sampling())
    before = model.head.reward_scale.clone()
    model.head.calibrate(compute_features(model, sequences, lm.device).to(lm.device))
    with new_folder(output, "--output") as target:
        copy_sealed(ensemble, target)
        state = {k: v.contiguous().cpu() for k, v in model.head.saved_state().items()}
        save_file(state, target / WEIGHTS_NAME)
        seal(target)
    change = (model.head.reward_scale / before).tolist()
    print(f"calibrated on {len(sequences)} responses of {reference.path}; written to {output}")
    print("each member's unit, new / old: " + ", ".join(f"{x:.3f}" for x in change))


def disagreement(
    ensemble: str,
    output: str,
    data: PreferenceDataModule,
    pairs: list[int] | None = None,
    split: Literal["train", "val", "test", "ood"] = "val",
    max_pairs: int = 500,
    trust: list[str] | None = None,
) -> None:
    """Draw the scores of all members on a few responses, and the distribution of σ over a data set.

    Writes `members.png` (chosen and rejected response of each pair, a dot a member), `sigma.png`, and the figures
    behind them as `scores.csv` and `disagreement.json`.

    Args:
        ensemble: Folder of the ensemble.
        output: A new or empty folder for the pictures.
        data: Preferences, as in the reward stage.
        pairs: Numbers of the pairs to draw, in the split's order; `null` draws four with a small, four with a large σ.
        split: `train`, `val`, `test` or `ood`.
        max_pairs: Most pairs to score.
        trust: Code outside of lit_vapo that the ensemble may run, as in `calibrate`.

    Raises:
        ValueError: The ensemble has fewer than two members, or there is no such pair.
        FileExistsError: The output has files in it.
    """
    check_new(output, "--output")
    count = read_config(ensemble).num_members
    if count < 2:
        raise ValueError(f"--ensemble: expected at least 2 members to disagree, got {count}")
    if max_pairs < 1:
        raise ValueError(f"--max_pairs: expected at least 1, got {max_pairs}")
    rows = data.preference_rows(split)[:max_pairs]
    if not rows:
        raise ValueError(f"--split: expected one with pairs, got {split!r}, which has none")
    for number in pairs or []:
        if not 0 <= number < len(rows):
            raise ValueError(f"--pairs: expected numbers 0 … {len(rows) - 1}, got {number}")
    model = _on(RewardModel.from_pretrained(ensemble, trust=trust), _device())
    check_tokenizer(data.text_tokenizer, model.spec.base, "--data.tokenizer")
    both = data.preferences(split)
    sequences = [*both.chosen[: len(rows)], *both.rejected[: len(rows)]]
    estimate = model.head(compute_features(model, sequences, _device()).to(_device()))
    if estimate.members is None:
        raise ValueError(f"--ensemble: expected separate members to draw, got {type(model.head).__name__}")
    members = estimate.members.cpu()
    estimate = RewardEstimate(estimate.mean.cpu(), estimate.variance.cpu(), members)
    sigma = estimate.sigma
    order = sigma.view(2, -1).mean(0).argsort().tolist()
    drawn = pairs or list(dict.fromkeys([*order[:4], *order[-4:]]))
    index = [i for number in drawn for i in (number, number + len(rows))]
    texts = [_response(data, sequence) for sequence in sequences]
    sides = ["chosen"] * len(rows) + ["rejected"] * len(rows)
    unit = "standard deviations of the reference's rewards" if bool(model.head.calibrated) else "not calibrated"
    with new_folder(output, "--output") as target:
        labels = [f"[{sides[i]}] {texts[i]}" for i in index]
        member_scores(members[index], labels, target / "members.png", unit=unit)
        sigma_histogram(sigma, target / "sigma.png", unit=unit)
        write_scores(target / "scores.csv", estimate, [row["place"] for row in rows] * 2, sides, texts)
        summary = {"num_responses": len(sequences), **_quantiles(sigma), "pairs": drawn}
        (target / "disagreement.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"mean σ {float(sigma.mean()):.3f} ({unit}) over {len(sequences)} responses; pictures in {output}")


def _quantiles(sigma: Tensor) -> dict[str, Any]:
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    values = sigma.quantile(torch.tensor(shares)).tolist()
    return {"sigma_mean": float(sigma.mean()), "sigma_quantiles": dict(zip(map(str, shares), values, strict=True))}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _on(model: RewardModel, device: torch.device) -> RewardModel:
    if model.spec.base.quantization is None:
        return model.to(device)
    model.head.to(device)  # the backbone was quantised where it belongs
    return model


def _response(data: PreferenceDataModule, sequence: Any) -> str:
    ids = sequence.ids[sequence.prompt_length :]
    return str(data.text_tokenizer.decode(ids, skip_special_tokens=True))
