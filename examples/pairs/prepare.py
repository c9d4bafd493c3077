"""What a study of your own preferences starts from: features of both sides of every pair, by a frozen language model.

    python -m examples.pairs.prepare --preferences pairs.jsonl --base runs/demo/policy-base --output runs/pairs

Half of the prompts are set aside: there the two responses of a pair are all there is, and the one that people preferred
is truly better. Nobody else needs to judge. Files and their shapes are those of every stage (docs/data.md). How sure a
preference is (`agreement`) counts for the truth; ensembles learn from all that are no ties as if they were certain.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import auto_cli

from examples.sentiment.prepare import once
from lit_vapo.data.collate import pair_labels
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.data.mixing import Sources
from lit_vapo.data.splits import prefers
from lit_vapo.folders import claim_folder
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.reward_model import FeatureSpec
from lit_vapo.study.experiments.reference_responses import feature_model
from lit_vapo.study.experiments.responses import KnownResponses


def prepare(
    preferences: Sources,
    base: str,
    output: str,
    layer: int | None = None,
    held_out: float = 0.5,
    max_length: int = 512,
    skip_invalid: bool = False,
) -> None:
    """Prepare a study of preferences.

    Args:
        preferences: Files or hub names of pairs.
        base: Language model whose hidden states the ensembles read.
        output: Folder of what is prepared.
        layer: Which of its layers; the last if left out.
        held_out: Share of the prompts that policies are judged on; ensembles learn from the others.
        max_length: Most tokens of prompt and response.
        skip_invalid: Leave rows out that cannot be used, and say how many.

    Raises:
        ValueError: The folder was prepared with other options, or a part is empty.
    """
    root = Path(output)
    root.mkdir(parents=True, exist_ok=True)
    options = {"preferences": preferences, "base": base, "layer": layer, "held_out": held_out, "max_length": max_length}

    def write(folder: Path) -> None:
        data = PreferenceDataModule(
            base,
            preferences=preferences,
            validation_fraction=held_out,
            max_length=max_length,
            append_eos=False,
            skip_invalid=skip_invalid,
        )
        data.prepare_data()
        counted = torch.tensor([row["weight"] > 0 for row in data.preference_rows("val")])
        if not counted.any():
            raise ValueError(f"held_out: expected a share that sets a pair aside, got {held_out}")
        claim_folder(root, "output", options)
        model, cpu = feature_model(FeatureSpec(Pretrained(base), pooling="mean", layer=layer)), torch.device("cpu")
        learn, judge = (
            [compute_features(model, side, cpu) for side in data.preferences(split)] for split in ("train", "val")
        )
        # Ties teach nothing.
        stated = torch.tensor([prefers(row) for row in data.preference_rows("train")])
        better = pair_labels(data.preference_rows("val")).probability
        responses, true = torch.stack(judge, 1), torch.stack([better, 1 - better], 1)
        known = KnownResponses(responses[counted], true[counted], *(side[stated] for side in learn))
        known.save(folder)
        print(f"{len(known.chosen)} pairs to learn from, {len(known.true)} to be judged on")

    if (root / "known").exists():
        claim_folder(root, "output", options)
    once(root / "known", "features", write)


if __name__ == "__main__":
    auto_cli(prepare, as_positional=False)
