"""Features of a frozen backbone: computed once, kept in a safetensors cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_vapo.folders import write_whole
from lit_vapo.models.batching import TOKENS_PER_BATCH, even_batches, right_pad
from lit_vapo.models.fingerprint import model_fingerprints
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.tensors import check_finite, read_metadata, read_tensors, write_tensors
from lit_vapo.models.trunk import pooled
from lit_vapo.progress import watched
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.types import TokenSequence

FEATURES, DIGEST = "features", "sha256"


def compute_features(model: RewardModel, sequences: Sequence[TokenSequence], device: torch.device) -> Tensor:
    """Features of sequences batched by length, float32 on the CPU: (N, H), or (N, K, H) where members differ.

    Raises:
        ValueError: There is no sequence, or a feature is not finite (naming the sequence).
    """
    (features,) = compute_layers(model, sequences, device, [None])
    return features


@torch.no_grad()
def compute_layers(
    model: RewardModel, sequences: Sequence[TokenSequence], device: torch.device, layers: Sequence[int | None]
) -> list[Tensor]:
    """The same for several layers of the model's backbone at once (`None` for its last), from one pass."""
    if not sequences:
        raise ValueError("expected at least one sequence, got none")
    batches, order = [], []
    for rows in even_batches([len(s.ids) for s in sequences], TOKENS_PER_BATCH, model.most, device):
        order += rows
        prompts = torch.tensor([sequences[i].prompt_length for i in rows], device=device)
        batches.append((*right_pad([sequences[i].ids for i in rows], device), prompts))
    back = torch.tensor(order).argsort()
    reads = (model.spec.pooling, model.spec.ends, layers)
    outputs: list[list[Tensor]] = [[] for _ in layers]

    def every_batch(backbone: PreTrainedModel) -> list[list[Tensor]]:
        every = watched(batches, "features: batch")
        return [[features.cpu() for features in pooled(backbone, *batch, *reads)] for batch in every]

    # All batches for one model before the next, which may have to be read from disk.
    for parts in model.each_pass(every_batch):
        for output, part in zip(outputs, zip(*parts, strict=True), strict=True):
            output.append(torch.cat(part)[back])
    found = [model.head.join(output) for output in outputs]
    for out in found:
        if not torch.isfinite(out).all():
            row = int((~torch.isfinite(out)).flatten(1).any(1).nonzero()[0, 0])
            raise ValueError(f"expected finite features, got NaN or infinity for sequence {row}")
    return found


def feature_key(spec: FeatureSpec, sequences: Sequence[TokenSequence]) -> str:
    """Key of a cache: changes with the model (settings and files), the tokenizer and the data.

    The token ids stand for tokenizer, template, truncation and data at once.
    """
    digest = hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode())
    folder = Path(spec.base.path)
    if folder.is_dir():
        for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json")):
            stat = file.stat()
            digest.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    for sequence in sequences:
        digest.update(json.dumps(sequence).encode())
    return digest.hexdigest()[:32]


def feature_path(folder: Path, key: str) -> Path:
    """Where the features of a key are kept."""
    return folder / f"{key}.safetensors"


def save_features(folder: Path, key: str, features: Tensor) -> None:
    """Write a cache file, with a digest of what it holds; readers see all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{key}.{os.getpid()}.partial"
    write_tensors(partial, {FEATURES: features}, {DIGEST: _digest(features)})
    partial.replace(feature_path(folder, key))


def load_features(folder: Path, key: str) -> Tensor | None:
    """Cached features (N, H) or (N, K, H), or `None`.

    Raises:
        ValueError: The file is torn, was changed, or holds something else.
    """
    path = feature_path(folder, key)
    if not path.is_file():
        return None
    tensors, noted = read_tensors(path), read_metadata(path).get(DIGEST)
    if tensors.keys() != {FEATURES} or _digest(tensors[FEATURES]) != noted:
        raise ValueError(
            f"{path}: expected features as they were written, got others: the file was changed or damaged. It is a "
            "cache: remove it, and they are computed anew."
        )
    check_finite(tensors, path)
    return tensors[FEATURES]


def sampling_key(reference: Pretrained, sampling: Sampling, seed: int, prompts: Sequence[Tensor]) -> str:
    """Key of a reference's responses: changes with the model, how it responds, and what it responds to."""
    settings = {"reference": asdict(reference), "sampling": asdict(sampling), "seed": seed}
    told = [settings, model_fingerprints(settings, ""), [ids.tolist() for ids in prompts]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def save_responses(folder: Path, key: str, sequences: Sequence[TokenSequence]) -> None:
    """Write what a reference responded, so that a resumed run need not ask it again."""
    said = json.dumps(sequences)
    write_whole(folder / f"{key}.responses.json", json.dumps({DIGEST: _text_digest(said), "sequences": said}))


def load_responses(folder: Path, key: str) -> list[TokenSequence] | None:
    """What a reference responded before, or `None`; a file that was changed or damaged is taken for none."""
    path = folder / f"{key}.responses.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found[DIGEST] != _text_digest(found["sequences"]):
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return [TokenSequence(*sequence) for sequence in json.loads(found["sequences"])]


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(features: Tensor) -> str:
    return hashlib.sha256(cast("Any", features.contiguous().view(torch.uint8).numpy())).hexdigest()
