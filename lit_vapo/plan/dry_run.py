"""Runs the passes of a run on tensors without data, by the code of the run, and says what they take.

A pass is made with PyTorch's fake tensors: every operation gives shapes and data types, so that what it makes, keeps
and lets go is known, and nothing is computed. What autocast, adapters, gradient checkpointing and chunked heads do to
memory need not be known here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_vapo.functional import token_logprobs
from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.policy import Policy, Role
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.transformers_generator import drawn
from lit_vapo.models.trunk import Tap, response_states
from lit_vapo.models.weightless import quantised_forward, quantised_weight
from lit_vapo.plan.meter import Meter


@dataclass
class Found:
    """What a pass takes.

    Attributes:
        moments: Bytes by part, without what the models hold, at the peak of each of its stretches. More blocks make
            one grow and not another, so that it takes all of them to know the peak of a larger model.
        flops: Floating-point operations.
    """

    moments: list[dict[str, float]]
    flops: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part at the largest peak."""
        return max(self.moments, key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> float:
        """Bytes at the largest peak."""
        return sum(self.parts.values())


def _found(meter: Meter) -> Found:
    return Found([dict(parts) for parts in meter.peaks], meter.flops)


class DryRun:
    """Networks as fake tensors, and the passes that a run makes through them.

    Args:
        networks: All of the run's networks, made in `weightless`; they are changed in place.
        vocabulary: V of the policy.
        mixed: The data type that autocast computes in, or `None` without it.
        on_cpu: Quantised layers as a CPU computes them.
    """

    def __init__(self, networks: nn.Module, vocabulary: int, mixed: torch.dtype | None, on_cpu: bool) -> None:
        self.networks = networks
        self.vocabulary = vocabulary
        self.mixed = mixed
        self.on_cpu = on_cpu
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake:
            _without_data(networks, on_cpu)

    @contextmanager
    def _metered(self, trained: Sequence[nn.Parameter] = ()) -> Iterator[Meter]:
        """A block that is counted, under autocast if the run is, with the gradients that are there already."""
        meter = Meter(self.networks, self.vocabulary)
        with warnings.catch_warnings(), self._fake, meter:
            warnings.simplefilter("ignore")
            for parameter in trained:
                with meter.part("gradients"):
                    parameter.grad = torch.zeros_like(parameter)
            meter.start_over()
            # As Lightning has it: without a cache, each use of a weight makes a cast of its own.
            dtype, enabled = self.mixed or torch.bfloat16, self.mixed is not None
            with torch.autocast("cpu", dtype, enabled, cache_enabled=False), self._as_on_a_gpu():
                yield meter
        for parameter in trained:
            parameter.grad = None

    @contextmanager
    def _as_on_a_gpu(self) -> Iterator[None]:
        """A block in which who asks whether a GPU has autocast on is told so; peft makes a copy of inputs otherwise."""
        before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", self.mixed is not None and not self.on_cpu)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before)

    @contextmanager
    def _cut_below(self, meter: Meter) -> Iterator[None]:
        """A block in which a stretch ends where a gradient has come through all blocks, down to the embeddings."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: meter.cut())

        tables = [m for m in self.networks.modules() if isinstance(m, nn.Embedding)]
        handles = [table.register_forward_hook(hook) for table in tables]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # The passes.

    def generate(self, policy: Policy, prompts: int, each: int, prompt_length: int, new: int) -> list[Found]:
        """Reading `prompts` prompts, and drawing the last token of `each` responses to each.

        Returns:
            Reading, whose FLOPs are for all prompts, and drawing, whose FLOPs are for one token of each response.
        """
        rows = prompts * each
        with torch.no_grad(), policy.acting_as("actor") as lm:
            with self._metered() as meter:
                with meter.part("activations"):
                    out: Any = self._read(lm, prompts, prompt_length)
                out.logits[:, -1].float().softmax(-1)
                reading = Found([_with_cache(meter.at_peak, out.past_key_values)], meter.flops)
            del out
            with self._metered() as meter:
                cache = self._read(lm, rows, prompt_length + new - 1).past_key_values
                meter.start_over()
                before = meter.flops
                mask = torch.ones(rows, prompt_length + new, dtype=torch.long)
                with meter.part("activations"):
                    ids = torch.zeros(rows, 1, dtype=torch.long)
                    out = lm(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
                # `generate` has a copy of its own.
                drawn(out.logits[:, -1].to(torch.float32, copy=True), 2.0)
                drawing = Found([_with_cache(meter.at_peak, out.past_key_values)], meter.flops - before)
        return [reading, drawing]

    def _read(self, lm: nn.Module, rows: int, length: int) -> Any:
        ids = torch.zeros(rows, length, dtype=torch.long)
        return lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)

    def score(self, networks: ActorCritic, rows: int, prompt_length: int, new: int, taps: Sequence[Tap] = ()) -> Found:
        """A pass of the reference, with the heads that read it, then one of the actor, and one of the critic."""
        with torch.no_grad(), self._metered() as meter:
            batch = _rows(rows, prompt_length, new)
            with meter.part("activations"):
                read = networks.value_layer if networks.critic_trunk == "reference" else None
                layers = [None, read, *(tap.layer for tap in taps)]
                with networks.lower.keep() as kept:
                    last, valued, *_ = networks.policy.layers("reference", batch.input_ids, batch.lengths, layers)
            self._logprobs(networks.policy, "reference", last, batch)
            states = None
            if networks.critic_trunk == "reference":
                states = response_states(valued, batch.prompt_lengths, new)
            del last, valued, _
            with meter.part("activations"), networks.lower.give(kept[0] if kept else None):
                hidden = networks.policy.hidden("actor", batch.input_ids, batch.lengths).last
            self._logprobs(networks.policy, "actor", hidden, batch)
            del hidden
            if networks.critic is not None:
                with meter.part("activations"):
                    networks.values(batch, states)
            return _found(meter)

    def learn(self, networks: ActorCritic, rows: int, prompt_length: int, new: int) -> Found:
        """A microbatch of the update: policy and value loss, and the way back, beside gradients of earlier ones."""
        trained = [*networks.actor_parameters(), *networks.critic_parameters()]
        with self._metered(trained) as meter, self._cut_below(meter):
            batch = _rows(rows, prompt_length, new)
            with meter.part("activations"):
                width, dtype = networks.policy.hidden_size, networks.policy.causal_lm.dtype
                lower = torch.zeros(*batch.input_ids.shape, width, dtype=dtype) if networks.lower.depth else None
            with meter.part("activations"), networks.lower.give(lower):
                hidden = networks.policy.hidden("actor", batch.input_ids, batch.lengths).last
            loss = self._logprobs(networks.policy, "actor", hidden, batch).sum()
            if networks.critic is not None:
                kept = networks.critic_trunk == "reference"
                states = torch.zeros(rows, new, width, dtype=hidden.dtype) if kept else None
                with meter.part("activations"):
                    loss = loss + networks.values(batch, states).sum()
            meter.cut()
            loss.backward()
            return _found(meter)

    def imitate(self, policy: Policy, rows: int, length: int) -> Found:
        """A step of supervised fine-tuning on whole sequences."""
        with self._metered(policy.actor_parameters()) as meter, self._cut_below(meter):
            batch = _rows(rows, 1, length - 1)
            with meter.part("activations"):
                hidden = policy.hidden("actor", batch.input_ids, batch.lengths).last
            loss = self._logprobs(policy, "actor", hidden, batch).sum()
            meter.cut()
            loss.backward()
            return _found(meter)

    def read(self, run: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int, length: int) -> Found:
        """A pass of a reward model without a gradient: `run` gets ids (B, L), lengths and lengths of prompts."""
        with torch.no_grad(), self._metered() as meter:
            with meter.part("activations"):
                run(*_sequences(rows, length))
            return _found(meter)

    def compare(
        self,
        encode: Callable[[Tensor, Tensor, Tensor], Tensor],
        rewards: Callable[[Tensor], Tensor],
        trained: Sequence[nn.Parameter],
        rows: int,
        length: int,
    ) -> Found:
        """A step of reward training on so many sequences, chosen and rejected ones."""
        with self._metered(trained) as meter, self._cut_below(meter):
            with meter.part("activations"):
                features = encode(*_sequences(rows, length))
            loss = rewards(features).sum()
            meter.cut()
            loss.backward()
            return _found(meter)

    def _logprobs(self, policy: Policy, role: Role, hidden: Tensor, batch: TokenRows) -> Tensor:
        """Log-probabilities of all response tokens, as `head_logprobs` has them; a mask would need data."""
        states = response_states(hidden, batch.prompt_lengths, batch.response_mask.shape[1]).flatten(0, 1)
        chosen = states[torch.arange(len(states))]
        with policy.acting_as(role) as lm:
            head = cast("Any", lm.get_output_embeddings())
            softcap = getattr(lm.config, "final_logit_softcapping", None)
            out = token_logprobs(
                chosen,
                head.weight,
                torch.zeros(len(chosen), dtype=torch.long),
                bias=getattr(head, "bias", None),
                softcap=softcap,
            )
        return out.logprobs


def _sequences(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return ids, torch.full((rows,), length), torch.full((rows,), length // 2)


def _rows(rows: int, prompt_length: int, new: int) -> TokenRows:
    ids = torch.zeros(rows, prompt_length + new, dtype=torch.long)
    return TokenRows(ids, torch.full((rows,), prompt_length), torch.ones(rows, new, dtype=torch.bool))


def _with_cache(parts: dict[str, int], cache: Any) -> dict[str, float]:
    """The parts of a peak, with keys and values, which a pass makes like all the rest, apart from activations."""
    held = [x for layer in getattr(cache, "layers", []) for x in (layer.keys, layer.values) if isinstance(x, Tensor)]
    size = sum(x.untyped_storage().nbytes() for x in held)
    return {**parts, "activations": max(0, parts.get("activations", 0) - size), "cache": size}


def _without_data(networks: nn.Module, on_cpu: bool) -> None:
    """Put fake tensors in place of all that modules hold, with quantised layers as they are once quantised.

    Here, where a `FakeTensorMode` is on, new tensors are fake; tied weights stay tied.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(x: Tensor) -> Tensor:
        if id(x) not in made:
            empty = torch.empty(x.shape, dtype=x.dtype)
            new = nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty
            made[id(x)] = (x, new)
        return made[id(x)][1]

    for module in networks.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None:
                    cast("dict[str, Any]", held)[name] = fake(x)
        quantised = quantised_weight(module)
        if quantised is not None:
            weight, scale = (torch.empty(shape, dtype=dtype) for shape, dtype in quantised.values())
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            module.register_buffer("scale", scale, persistent=False)
            cast("Any", module).forward = quantised_forward(module, on_cpu)


def held_bytes(*modules: nn.Module) -> float:
    """Bytes of what modules hold, once each."""
    storages = (x.untyped_storage() for module in modules for x in (*module.parameters(), *module.buffers()))
    return float(sum({storage._cdata: storage.nbytes() for storage in storages}.values()))


def parameter_bytes(parameters: Sequence[nn.Parameter]) -> float:
    """Bytes of parameters, once each."""
    return float(sum({id(p): p.numel() * p.element_size() for p in parameters}.values()))
