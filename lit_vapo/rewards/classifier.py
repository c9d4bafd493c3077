"""A head ensemble as an ordinary sequence classifier, for programs that know transformers only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from lit_vapo.folders import check_new
from lit_vapo.models.digests import seal
from lit_vapo.models.weights import hushed
from lit_vapo.rewards.reward_model import RewardModel

OFFSET = "reward_offset"


@hushed()
def save_classifier(model: RewardModel, folder: str | Path) -> None:
    """Write K linear heads as `AutoModelForSequenceClassification` with `num_labels = K`, with its tokenizer.

    The whole is written in float32. Logit k is member k's normalised reward up to a constant, since the classifiers of
    transformers have no bias. The constants stand in the configuration: reward = logits + config.reward_offset.
    Differences of responses need none.

    Args:
        model: A reward model with its backbone.
        folder: A new or empty folder.

    Raises:
        ValueError: The heads are not linear or read anything but the last token, or the backbone is quantised.
        FileExistsError: The folder has files in it.
    """
    check_new(folder, "--output")
    linear, spec = model.head.linear_members(), model.spec
    if linear is None or spec.pooling != "last" or spec.base.quantization is not None:
        raise ValueError(
            "a classifier: expected linear heads on one unquantised backbone with pooling `last`, got "
            f"{type(model.head).__name__} with pooling {spec.pooling!r}, quantization {spec.base.quantization}"
        )
    weight, offset = linear
    # A reward of half precision would be coarser than the members' differences.
    backbone = model.backbone.float()
    tokenizer = model.load_tokenizer()
    config = copy.deepcopy(backbone.config)
    config.dtype = torch.float32
    config.num_labels = len(weight)
    config.id2label = {k: f"member_{k}" for k in range(len(weight))}
    config.label2id = {name: k for k, name in config.id2label.items()}
    setattr(config, OFFSET, offset.tolist())
    # The classifier scores the last token that is not padding. The members do not read the end of a response, so that
    # is what it pads with; where they do read it, anything else.
    if spec.ends:
        first = tokenizer.eos_token_id if tokenizer.eos_token_id in spec.ends else spec.ends[0]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(first)
    elif tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _unused_token(tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    classifier = cast("Any", AutoModelForSequenceClassification).from_config(config)
    setattr(classifier, backbone.base_model_prefix, backbone)
    classifier.score = nn.Linear(weight.shape[1], len(weight), bias=False)
    classifier.score.weight = nn.Parameter(weight)
    with torch.no_grad():
        classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seal(folder)


def _unused_token(tokenizer: Any) -> str:
    """A special token other than the end of sequence.

    Raises:
        ValueError: There is none.
    """
    for token in tokenizer.all_special_tokens:
        if token != tokenizer.eos_token:
            return str(token)
    raise ValueError(
        f"a classifier: expected a tokenizer with a special token to pad with, got {tokenizer.name_or_path!r}, where "
        "every one ends a response"
    )
