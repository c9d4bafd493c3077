"""What is done to a finished ensemble: join members, centre and scale them anew, look at where they disagree."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.evaluation.files import write_scores
from lit_vapo.figures import member_scores, sigma_histogram
from lit_vapo.models.features import compute_features
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained, load_causal_lm, place
from lit_vapo.models.reward import CONFIG_NAME, WEIGHTS_NAME, RewardModel, read_config
from lit_vapo.modules.checkpoint import seeded
from lit_vapo.rollout import sample_references


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
            if config[name] != first[name]:
                raise ValueError(f"{folder}: expected {name} as in {members[0]}, {first[name]}, got {config[name]}")
        for k in config["members"]:
            if k in found:
                raise ValueError(f"{folder}: expected each member once, got member {k} here and in {found[k]}")
            found[k] = Path(folder)
    count = int(first["num_members"])
    missing = sorted(set(range(count)) - set(found))
    if missing:
        raise ValueError(f"--members: expected all {count} members, got none for {missing}")
    target = _new_folder(output)
    weights = [load_file(found[k] / WEIGHTS_NAME) for k in range(count)]
    joined: dict[str, Tensor] = {}
    for name, value in weights[0].items():
        rows = [w[name] for w in weights]
        each = value.ndim > 0 and value.shape[0] == count
        joined[name] = torch.stack([row[k] for k, row in enumerate(rows)]) if each else value
    # The members' typical variance takes all of them: it is fixed where they are calibrated together.
    joined["calibrated"] = torch.zeros_like(joined["calibrated"])
    for k, source in found.items():
        shutil.copytree(source / f"member_{k}", target / f"member_{k}")
    save_file(joined, target / WEIGHTS_NAME)
    (target / CONFIG_NAME).write_text(json.dumps({**first, "members": list(range(count))}, indent=2) + "\n")
    print(f"joined {count} members to {target}; `lit-vapo reward calibrate` or the start of PPO makes them comparable")


def calibrate(
    ensemble: str,
    output: str,
    reference: Pretrained,
    data: PreferenceDataModule,
    sampling: Sampling | None = None,
    num_reference: int = 256,
    seed: int = 0,
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

    Raises:
        FileExistsError: The output has files in it.
    """
    target = _new_folder(output)
    model = RewardModel.from_pretrained(ensemble)
    lm = place(load_causal_lm(reference), torch.device("cpu" if not torch.cuda.is_available() else "cuda"))
    model = _on(model, lm.device)
    with seeded(seed):
        batches = data.prompt_batches("train", num_reference)
        sequences = sample_references(lm, data.text_tokenizer, batches, sampling or Sampling())
    before = model.head.reward_scale.clone()
    model.head.calibrate(compute_features(model, sequences, lm.device).to(lm.device))
    shutil.copytree(ensemble, target, dirs_exist_ok=True)
    state = {k: v.contiguous().cpu() for k, v in model.head.saved_state().items()}
    save_file(state, target / WEIGHTS_NAME)
    change = (model.head.reward_scale / before).tolist()
    print(f"calibrated on {len(sequences)} responses of {asdict(reference)['path']}; written to {target}")
    print("each member's unit, new / old: " + ", ".join(f"{x:.3f}" for x in change))


def disagreement(
    ensemble: str,
    output: str,
    data: PreferenceDataModule,
    pairs: list[int] | None = None,
    split: str = "val",
    max_pairs: int = 500,
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

    Raises:
        ValueError: The ensemble has fewer than two members, or there is no such pair.
        FileExistsError: The output has files in it.
    """
    count = int(read_config(ensemble)["num_members"])
    if count < 2:
        raise ValueError(f"--ensemble: expected at least 2 members to disagree, got {count}")
    rows = data.preference_rows(split)[:max_pairs]
    if not rows:
        raise ValueError(f"--split: expected one with pairs, got {split!r}, which has none")
    for number in pairs or []:
        if not 0 <= number < len(rows):
            raise ValueError(f"--pairs: expected numbers 0 … {len(rows) - 1}, got {number}")
    target = _new_folder(output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _on(RewardModel.from_pretrained(ensemble), device)
    both = data.preferences(split)
    sequences = [*both.chosen[: len(rows)], *both.rejected[: len(rows)]]
    estimate = model.head(compute_features(model, sequences, device).to(device))
    estimate = type(estimate)(*(x.cpu() for x in estimate))
    sigma = estimate.variance.sqrt()
    typical = sigma.view(2, -1).mean(0)
    order = typical.argsort().tolist()
    drawn = pairs if pairs is not None else list(dict.fromkeys([*order[:4], *order[-4:]]))
    index = [i for number in drawn for i in (number, number + len(rows))]
    names = [f"{_short(_response(data, sequences[i]))}  [{'chosen' if i < len(rows) else 'rejected'}]" for i in index]
    member_scores(estimate.members[index], names, target / "members.png")
    sigma_histogram(sigma, target / "sigma.png")
    texts = [_response(data, sequence) for sequence in sequences]
    sides = ["chosen"] * len(rows) + ["rejected"] * len(rows)
    places = [row["place"] for row in rows] * 2
    write_scores(target / "scores.csv", estimate, places, sides, texts)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    summary = {
        "num_responses": len(sequences),
        "sigma_mean": float(sigma.mean()),
        "sigma_quantiles": dict(zip(map(str, quantiles.tolist()), sigma.quantile(quantiles).tolist(), strict=True)),
        "pairs": drawn,
    }
    (target / "disagreement.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"mean σ {float(sigma.mean()):.3f} over {len(sequences)} responses; pictures in {target}")


def _on(model: RewardModel, device: torch.device) -> RewardModel:
    return model if model.spec.base.quantization is not None else model.to(device)


def _new_folder(output: str) -> Path:
    target = Path(output)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"--output: expected a new or empty folder, got {output!r} with files in it")
    target.mkdir(parents=True, exist_ok=True)
    return target


def _response(data: PreferenceDataModule, sequence: Any) -> str:
    ids = sequence.ids[sequence.prompt_length :]
    return str(data.text_tokenizer.decode(ids, skip_special_tokens=True))


def _short(text: str, size: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= size else text[: size - 1] + "…"
