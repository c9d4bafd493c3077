"""One forward pass through a backbone, and what is read off it: hidden states and features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_vapo.models.pretrained import decoder_layers, final_norm
from lit_vapo.models.recompute import Again, forwards, recomputed

Pooling = Literal["last", "mean"]


class Tap(NamedTuple):
    """Pooled hidden states to read off a pass: one vector for each response.

    Attributes:
        layer: After this many blocks; `None` after the last.
        pooling: `last` or `mean` (see `pool`).
        ends: Tokens that are not read where they end a response (see `content_lengths`).
    """

    layer: int | None
    pooling: Pooling
    ends: tuple[int, ...] = ()


class TrunkOutput(NamedTuple):
    """Hidden states of right-padded sequences.

    Attributes:
        last: After the last block and the final normalisation (B, L, H).
        tapped: After an inner block and the final normalisation (B, L, H); `last` if no block was asked for.
    """

    last: Tensor
    tapped: Tensor


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """True at the first `lengths` of `size` positions (B, size)."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


@contextmanager
def _tap(backbone: PreTrainedModel, layers: Iterable[int], store: dict[int, Tensor]) -> Iterator[None]:
    blocks = decoder_layers(backbone)

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            store[layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = []
    try:
        for layer in layers:
            if not 1 <= layer <= len(blocks):
                raise ValueError(f"layer: expected 1 … {len(blocks)}, got {layer}")
            handles.append(blocks[layer - 1].register_forward_hook(keep(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unread(backbone: PreTrainedModel, depth: int) -> Iterator[None]:
    """A block in which nothing is computed above this many blocks: those hand on what reached the first of them."""
    blocks = list(decoder_layers(backbone))
    output: list[Any] = []

    def keep(module: nn.Module, args: object, found: Any) -> None:
        output[:] = [found]

    handle = blocks[depth - 1].register_forward_hook(keep)
    try:
        with forwards(blocks[depth:], lambda _: lambda *args, **options: output[0]):
            yield
    finally:
        handle.remove()


@contextmanager
def last_rows_only(backbone: PreTrainedModel, lengths: Tensor) -> Iterator[None]:
    """Let the last block's output projection and MLP see the last real token of each row alone.

    A block adds what these return to states of all positions, to which one position is broadcast: the sum is right at
    the last real token and nowhere else, so this is for callers that read no other. Blocks without layers of these
    names are left as they are.
    """

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0]
        if states.ndim != 3 or states.shape[1] == 1:
            return None
        # Members may have repeated the rows.
        last = lengths.repeat(states.shape[0] // len(lengths)) - 1
        return states[torch.arange(len(last), device=last.device), last][:, None], *args[1:]

    block = decoder_layers(backbone)[-1]
    found = [m for name, m in block.named_modules() if name in ("self_attn.o_proj", "mlp")]
    handles = [module.register_forward_pre_hook(take) for module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_trunk(backbone: PreTrainedModel, input_ids: Tensor, lengths: Tensor, layer: int | None = None) -> TrunkOutput:
    """Run a backbone on right-padded sequences.

    Args:
        backbone: A decoder without its language-model head.
        input_ids: Token ids (B, L), right-padded with anything.
        lengths: Real tokens of each row (B,); the mask comes from here, never from the ids.
        layer: Also return the hidden states after this many blocks.

    Returns:
        The hidden states (see `TrunkOutput`).
    """
    return TrunkOutput(*run_layers(backbone, input_ids, lengths, [None, layer]))


def run_layers(
    backbone: PreTrainedModel,
    input_ids: Tensor,
    lengths: Tensor,
    layers: Sequence[int | None],
    again: Again = nullcontext,
) -> list[Tensor]:
    """Hidden states (B, L, H) after each of some blocks and the final normalisation, from one pass.

    The pass ends with the last block that is read: those above compute nothing.

    Args:
        backbone: A decoder without its language-model head.
        input_ids: Token ids (B, L), right-padded with anything.
        lengths: Real tokens of each row (B,).
        layers: Read after so many blocks each; `None` after the last.
        again: Where blocks are computed again, a block to do that in (see `recomputed`).
    """
    mask = length_mask(lengths, input_ids.shape[1]).long()
    count = len(decoder_layers(backbone))
    store: dict[int, Tensor] = {}
    tapped = {layer for layer in layers if layer is not None and layer != count}
    unread = _unread(backbone, max(tapped)) if len(tapped) == len(set(layers)) else nullcontext()
    with _tap(backbone, tapped, store), recomputed(backbone, again), unread:
        last = backbone(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    normed = {layer: final_norm(backbone)(states) for layer, states in store.items()}
    return [last if layer in (None, count) else normed[layer] for layer in layers]


def content_lengths(input_ids: Tensor, lengths: Tensor, prompt_lengths: Tensor, ends: Sequence[int]) -> Tensor:
    """Lengths without the token that ended a response (B,): what a reward reads.

    Whether a text has ended is easier to see than whether it is good. A head that may read the end learns that, and
    each member by a different amount.

    Args:
        input_ids: Token ids (B, L) of prompt and response, right-padded.
        lengths: Real tokens of each row (B,).
        prompt_lengths: Tokens of each prompt (B,).
        ends: Tokens that end a response.
    """
    last = input_ids.gather(1, lengths[:, None] - 1)[:, 0]
    ended = torch.isin(last, torch.tensor(list(ends), dtype=last.dtype, device=last.device))
    # A row keeps a token to be read, though it be an end that follows no prompt.
    return (lengths - (ended & (lengths > prompt_lengths)).long()).clamp_min(1)


def pool(hidden: Tensor, lengths: Tensor, prompt_lengths: Tensor, pooling: Pooling) -> Tensor:
    """Features of each response: one vector a row, float32.

    Args:
        hidden: Hidden states (B, L, H) of prompt and response, right-padded.
        lengths: Tokens of each row that are read (B,), as in `content_lengths`.
        prompt_lengths: Tokens of each prompt (B,).
        pooling: `last`, the state at the last token read; `mean`, the mean over the response's tokens. Where nothing of
            a response is read, both are the state at the last token of the prompt.

    Returns:
        Features (B, H).
    """
    rows = torch.arange(len(lengths), device=hidden.device)
    if pooling == "last":
        return hidden[rows, lengths - 1].float()
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    first = torch.minimum(prompt_lengths, lengths - 1)
    inside = (positions >= first[:, None]) & (positions < lengths[:, None])
    states = torch.where(inside[..., None], hidden, torch.zeros((), dtype=hidden.dtype, device=hidden.device))
    return states.sum(1, dtype=torch.float32) / inside.sum(1, keepdim=True)


def join_rows(ids: Sequence[Tensor], lengths: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Several right-padded batches (B_i, L_i) as one (ΣB_i, max L_i), with their lengths."""
    size = max(x.shape[1] for x in ids)
    return torch.cat([widen(x, size) for x in ids]), torch.cat(list(lengths))


def widen(x: Tensor, size: int) -> Tensor:
    """Zeros appended along the second axis (B, T, …), up to `size`."""
    return nn.functional.pad(x, (*(0, 0) * (x.ndim - 2), 0, size - x.shape[1]))


def pooled(
    backbone: PreTrainedModel,
    input_ids: Tensor,
    lengths: Tensor,
    prompt_lengths: Tensor,
    pooling: Pooling,
    ends: Sequence[int] = (),
    layers: Sequence[int | None] = (None,),
    again: Again = nullcontext,
    rows: Tensor | None = None,
) -> list[Tensor]:
    """Features of right-padded sequences (B, L), one tensor for each of `layers`, from one pass.

    They are (B, H), or (B, K, H) from a backbone that answers once per member. The tokens of `ends` are not read where
    they end a response. A backbone whose answers are of other rows than these says of which: `rows` (N,), for features
    (N, H).
    """
    read = lengths = content_lengths(input_ids, lengths, prompt_lengths, ends)
    if rows is not None:
        lengths, prompt_lengths = lengths[rows], prompt_lengths[rows]
    with last_rows_only(backbone, lengths) if pooling == "last" else nullcontext():
        states = run_layers(backbone, input_ids, read, layers, again)
    copies = states[0].shape[0] // len(lengths)
    repeated = (lengths.repeat(copies), prompt_lengths.repeat(copies), pooling)
    features = [pool(hidden, *repeated) for hidden in states]
    return features if copies == 1 else [x.view(copies, len(lengths), -1).transpose(0, 1) for x in features]


def response_states(hidden: Tensor, prompt_lengths: Tensor, size: int) -> Tensor:
    """States from which each response token is predicted: position prompt_length − 1 + t for token t.

    Args:
        hidden: Hidden states (B, L, H), right-padded.
        prompt_lengths: Tokens of each prompt (B,), at least 1.
        size: Length T of the response axis; positions past the end repeat the last one.

    Returns:
        States (B, T, H).
    """
    offsets = prompt_lengths[:, None] - 1 + torch.arange(size, device=hidden.device)
    index = offsets.clamp_max(hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index)


def response_tokens(input_ids: Tensor, prompt_lengths: Tensor, size: int) -> Tensor:
    """Response tokens (B, T) of right-padded sequences (B, L); anything past a response's end."""
    offsets = prompt_lengths[:, None] + torch.arange(size, device=input_ids.device)
    return input_ids.gather(1, offsets.clamp_max(input_ids.shape[1] - 1))
