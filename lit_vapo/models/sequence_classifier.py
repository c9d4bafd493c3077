"""Public reward models: sequence classifiers of transformers, loaded whole and read at the true last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lit_vapo.models.batching import TOKENS_PER_BATCH, length_batches, right_pad
from lit_vapo.models.pretrained import Pretrained, freeze, load_kwargs, model_config
from lit_vapo.models.trunk import length_mask
from lit_vapo.models.vocabulary import vocabulary_size
from lit_vapo.models.weightless import is_weightless, reader
from lit_vapo.models.weights import check_model, loading

# The heads of transformers' classifiers. Decoders have a `score`, and read it at the last token that is no padding.
DECODER_HEAD, HEADS = "score", ("score", "classifier")


def count_labels(spec: Pretrained, key: str) -> int:
    """How many numbers a classifier gives a text, from its configuration alone.

    Args:
        spec: The model.
        key: The option that names it, for the message.

    Raises:
        ValueError: There is no such model.
    """
    return int(model_config(spec, f"{key}.path").num_labels)


def load_classifier(spec: Pretrained, key: str) -> PreTrainedModel:
    """The classifier of `spec`, frozen, in evaluation mode, with a head in float32.

    Args:
        spec: The model.
        key: The option that names it, for the message.

    Raises:
        ValueError: There is no such model, some of its weights are not in its files, or it needs a padding token.
    """
    if is_weightless():
        return _without_weights(spec, key)
    check_model(spec.path, f"{key}.path", spec.revision)
    with loading(spec.path, f"{key}.path"):
        model, found = AutoModelForSequenceClassification.from_pretrained(
            spec.path, output_loading_info=True, **load_kwargs(spec)
        )
    missing = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if missing:
        # Transformers fills them with random numbers and goes on.
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{key}.path: expected a trained reward model with all its weights, got {spec.path!r} without "
            f"{', '.join(missing[:3])}{more}: they would be random, and so would its rewards"
        )
    if _padding(model) is None and not hasattr(model, DECODER_HEAD):
        raise ValueError(
            f"{key}.path: expected a padding token (pad_token_id in config.json) of a model that does not read the "
            f"last token alone, got none in {spec.path!r} ({type(model).__name__})"
        )
    model.config.use_cache = False
    _sharpen(model)
    return cast("PreTrainedModel", freeze(model))


def _without_weights(spec: Pretrained, key: str) -> PreTrainedModel:
    with loading(spec.path, f"{key}.path"):
        model = reader(AutoModelForSequenceClassification)(spec.path, **load_kwargs(spec))
    model.config.use_cache = False
    _sharpen(model)
    return cast("PreTrainedModel", freeze(model))


def _sharpen(model: nn.Module) -> None:
    """Compute the last layer in float32: a reward of half precision is coarser than members differ."""
    for head in (getattr(model, name, None) for name in HEADS):
        if isinstance(head, nn.Module) and all(p.is_floating_point() for p in head.parameters()):
            head.float().register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))


@torch.no_grad()
def classify(model: PreTrainedModel, sequences: Sequence[Sequence[int]], tokens: int = TOKENS_PER_BATCH) -> Tensor:
    """What a classifier says of token sequences, each at its true last token.

    Which token that is comes from the lengths: transformers itself takes the last one that is not `pad_token_id`,
    which is another where a text ends with that token, or where there is none.

    Args:
        model: The classifier, on its device.
        sequences: N >= 1 token sequences.
        tokens: Tokens of a pass, padding included.

    Returns:
        Logits (N, K) in float32, on the model's device.
    """
    device = next(model.parameters()).device
    parts, order = [], []
    # Each model has a precision of its own, whatever the trainer's is.
    with torch.autocast(device.type, enabled=False):
        for rows in length_batches([len(s) for s in sequences], device, tokens):
            order += rows
            chosen = [sequences[i] for i in rows]
            fill = _fill(model, {s[-1] for s in chosen})
            ids, lengths = right_pad(chosen, device)
            mask = length_mask(lengths, ids.shape[1])
            with _padded_with(model, fill):
                out: Any = model(input_ids=torch.where(mask, ids, fill), attention_mask=mask.long())
            parts.append(out.logits.float())
    return torch.cat(parts)[torch.tensor(order).argsort().to(device)]


def _fill(model: PreTrainedModel, ends: set[int]) -> int:
    """A token to pad with; of a decoder, one that ends no row, so that the last one that differs from it is the last.

    Args:
        model: The classifier.
        ends: The last tokens of all rows.
    """
    own = _padding(model)
    if own is not None and not (own in ends and hasattr(model, DECODER_HEAD)):
        return own
    return next(i for i in range(vocabulary_size(model.config)) if i not in ends)


def _padding(model: PreTrainedModel) -> int | None:
    return cast("int | None", getattr(model.config.get_text_config(), "pad_token_id", None))


@contextmanager
def _padded_with(model: PreTrainedModel, fill: int) -> Iterator[None]:
    """A block in which a model takes `fill` for its padding."""
    configs = [model.config, model.config.get_text_config()]
    before = [getattr(config, "pad_token_id", None) for config in configs]
    try:
        for config in configs:
            config.pad_token_id = fill
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config.pad_token_id = own
