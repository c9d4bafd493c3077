"""Counts what tensors take while operations run, without running them: peak bytes by part, and FLOPs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lit_vapo.plan.formulas import attention_flops

_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Meter(TorchDispatchMode):
    """A block in which each new storage is counted for as long as it lives.

    What was there before the block is not counted. The parts are `casts` (weights that autocast keeps in half
    precision), `logits` (whatever has the vocabulary for its last axis), and otherwise what the current `part` is.

    Args:
        weights: Modules whose parameters autocast may cast.
        vocabulary: V, to know logits by.

    Attributes:
        live: Bytes of each part now.
        peak: The largest sum of them so far.
        at_peak: The parts at that time.
        flops: Floating-point operations of matrix products and attention, two for each product and sum.
    """

    def __init__(self, weights: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.flops = 0.0
        self._part = "workspace"
        self._total = 0
        self._vocabulary = vocabulary
        self._weights = {_key(p) for p in weights.parameters()}
        # Parts and sizes of what lives; size 0 for what came from outside.
        self._known: dict[int, tuple[str, int]] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A block in which what is made belongs to a part."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def start_over(self) -> None:
        """Forget the peak: it is what lives now."""
        self.peak, self.at_peak = self._total, dict(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it makes."""
        kwargs = kwargs or {}
        # Where a tensor is and how it is laid out is asked twice for each operation, and makes nothing.
        if func.namespace == "prim":
            return func(*args, **kwargs)
        for x in _tensors(args):
            self._watch(x.untyped_storage(), "", 0)
        out = func(*args, **kwargs)
        part = self._part
        if func is torch.ops.aten._to_copy.default and _key(args[0]) in self._weights:
            part = "casts"
        for x in _tensors((out,)):
            self._see(x, part)
        self.flops += _flops(func, args, kwargs, out)
        return out

    def _see(self, x: Tensor, part: str) -> None:
        storage = x.untyped_storage()
        if x.ndim > 1 and x.shape[-1] == self._vocabulary:
            part = "logits"
        if self._watch(storage, part, storage.nbytes()) and self._total > self.peak:
            self.peak, self.at_peak = self._total, dict(self.live)

    def _watch(self, storage: Any, part: str, size: int) -> bool:
        """Count a storage until it is gone; tell whether it is new."""
        key = storage._cdata
        if key in self._known:
            return False
        self._known[key] = (part, size)
        self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
        if size:
            self.live[part] += size
            self._total += size
        return True

    def _forget(self, key: int) -> None:
        part, size = self._known.pop(key, ("", 0))
        self._watched.pop(key, None)
        if size:
            self.live[part] -= size
            self._total -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among the arguments of an operation, which are at most in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _key(x: Tensor) -> int:
    return cast("int", x.untyped_storage()._cdata)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    packet = func.overloadpacket
    counted = cast("Callable[..., float] | None", flop_registry.get(packet))
    if counted is not None:
        return counted(*args, **kwargs, out_val=out)
    name = packet.__name__
    if name == "_int_mm":
        return 2.0 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
    if name == _CPU_ATTENTION:
        return attention_flops(args[0].shape, args[1].shape)
    if name == f"{_CPU_ATTENTION}_backward":
        # Scores once more, and two products for each of the two.
        return 2.5 * attention_flops(args[1].shape, args[2].shape)
    return 0.0
