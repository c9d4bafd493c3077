"""Actor and reference (and, if asked, the critic's trunk) on one base."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_vapo.functional import TokenLogprobs
from lit_vapo.models.exported import is_adapter, load_adapter_weights
from lit_vapo.models.heads import head_kl, head_logprobs
from lit_vapo.models.pretrained import (
    Lora,
    Pretrained,
    decoder_layers,
    disable_dropout,
    freeze,
    load_causal_lm,
)
from lit_vapo.models.quantised import keep_differentiable
from lit_vapo.models.shaping import Shaping
from lit_vapo.models.sharding import Sharing, most_of, within
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.trunk import TrunkOutput, response_states, response_tokens, run_layers
from lit_vapo.models.weights import hushed

Role = Literal["actor", "critic", "reference"]
T = TypeVar("T")


class Policy(nn.Module):
    """A policy π and its frozen reference π0.

    With LoRA, one (possibly quantised) base serves both: the reference is the base with its adapters off, and
    nothing is held twice. Without, the reference is held beside it, frozen and quantised if the base is to be, while
    the weights that train are whole. So it is, too, for a policy that starts from a whole model other than the base.

    Args:
        base: The reference, which is also where the policy starts if nothing else is said.
        lora: Adapters to train, or `None` to train every weight.
        critic_adapter: Add a second set of adapters for the critic.
        critic_depth: The critic reads after this many blocks, so its adapters stop there; `None` for all.
        keep_reference: Without LoRA, hold a reference.
        start: Folder of an exported policy to start from, an adapter of `base` (`lora` are its settings) or a whole
            model.

    Raises:
        ValueError: A quantised base without adapters or reference, a critic adapter without LoRA, or a start whose
            weights do not fit.
    """

    def __init__(
        self,
        base: Pretrained,
        lora: Lora | None,
        critic_adapter: bool = False,
        critic_depth: int | None = None,
        keep_reference: bool = True,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        if lora is None and base.quantization is not None and not keep_reference:
            raise ValueError(f"model.lora: expected adapters for a {base.quantization} base, which is frozen, got null")
        if lora is None and critic_adapter:
            raise ValueError("model.critic.trunk: expected `reference` or `own` when model.lora is null, got `lora`")
        whole = start is not None and not is_adapter(start)
        self.start = replace(base, path=start, revision=None) if start is not None and whole else base
        lm = load_causal_lm(self.start if lora is not None else replace(self.start, quantization=None, dtype="float32"))
        disable_dropout(lm)
        self.reference_lm: PreTrainedModel | None = None
        self.lm: PreTrainedModel | PeftModel
        if whole or (lora is None and keep_reference):
            self.reference_lm = _reference(base, lora)
        if lora is None:
            self.lm = cast("PreTrainedModel", lm.requires_grad_(True))
        else:
            keep_differentiable(freeze(lm))
            # Both before any adapter is in place, while the layers still bear their own names.
            actor, critic = lora_config(lora, lm), lora_config(lora, lm, critic_depth)
            self.lm = get_peft_model(lm, actor, adapter_name="actor")
            if critic_adapter:
                self.lm.add_adapter("critic", critic)
            if start is not None and not whole:
                load_adapter_weights(self.lm, "actor", start)
            # From the start: data-parallel strategies and checkpoints look at what trains when they meet the model.
            self._train_adapters()
        self.eval()

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model underneath the adapters."""
        return cast("PreTrainedModel", self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm)

    @property
    def hidden_size(self) -> int:
        """Width H of the hidden states."""
        return int(self.causal_lm.config.hidden_size)

    @property
    def lora_rank(self) -> int | None:
        """Rank of the actor's adapters; `None` where every weight trains."""
        return int(self.lm.peft_config["actor"].r) if isinstance(self.lm, PeftModel) else None

    @contextmanager
    def acting_as(self, role: Role) -> Iterator[PreTrainedModel]:
        """The language model in one of its roles, for the length of a block."""
        if role == "reference" and self.reference_lm is not None:
            yield self.reference_lm
        elif not isinstance(self.lm, PeftModel):
            yield self.causal_lm
        elif role == "reference":
            try:
                with self.lm.disable_adapter():
                    yield self.causal_lm
            finally:
                self._train_adapters()
        else:
            if self.lm.active_adapter != role:
                self.lm.set_adapter(role)
                self._train_adapters()
            yield self.causal_lm

    def lend(self, function: Callable[[PreTrainedModel], T]) -> T:
        """Call a function with the reference, less its language-model head."""
        return self.within("reference", lambda lm: function(cast("PreTrainedModel", lm.base_model)))

    def within(self, role: Role, function: Callable[[PreTrainedModel], T]) -> T:
        """Call a function with the language model in one of its roles, its weights at hand though they be sharded."""
        with self.acting_as(role) as lm:
            return within(lm, lambda: function(lm))

    def most(self, count: int) -> int:
        """Passes that all processes take which share the weights, of which this one needs `count`."""
        return most_of(self.causal_lm, count)

    def share(self, sharing: Sharing) -> None:
        """Share weights and products with other processes; adapters are not cut."""
        sharing.share(self.causal_lm, [p for n, p in self.lm.named_parameters() if "lora_" in n])
        if self.reference_lm is not None:
            sharing.share(self.reference_lm)

    def _train_adapters(self) -> None:
        # peft stops the gradients of adapters that are switched off; ours take turns within one optimiser.
        for name, parameter in self.lm.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)

    def actor_parameters(self) -> list[nn.Parameter]:
        """What PPO's policy loss trains."""
        if isinstance(self.lm, PeftModel):
            return [p for n, p in self.lm.named_parameters() if ".actor." in n and "lora_" in n]
        return list(self.lm.parameters())

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's own adapters, if it has any."""
        return [p for n, p in self.lm.named_parameters() if ".critic." in n and "lora_" in n]

    def hidden(self, role: Role, input_ids: Tensor, lengths: Tensor, layer: int | None = None) -> TrunkOutput:
        """Hidden states of right-padded sequences (B, L) in a role."""
        return TrunkOutput(*self.layers(role, input_ids, lengths, [None, layer]))

    def layers(self, role: Role, input_ids: Tensor, lengths: Tensor, layers: Sequence[int | None]) -> list[Tensor]:
        """Hidden states of right-padded sequences (B, L) in a role, after each of some blocks, from one pass."""
        again = partial(self.acting_as, role)
        with self.acting_as(role) as lm:
            backbone = cast("PreTrainedModel", lm.base_model)
            return within(lm, lambda: run_layers(backbone, input_ids, lengths, layers, again))

    def logprobs(
        self,
        role: Role,
        hidden: Tensor,
        input_ids: Tensor,
        prompt_lengths: Tensor,
        response_mask: Tensor,
        shaping: Shaping,
    ) -> TokenLogprobs:
        """Log-probabilities and entropies (B, T) of the responses, from hidden states (B, L, H)."""
        size = response_mask.shape[1]
        states = response_states(hidden, prompt_lengths, size)
        targets = response_tokens(input_ids, prompt_lengths, size)
        with self.acting_as(role) as lm:
            return within(lm, lambda: head_logprobs(lm, states, targets, response_mask, shaping))

    def kl(self, hidden: Tensor, ref_states: Tensor, rows: TokenRows, shaping: Shaping) -> Tensor:
        """Exact KL of each response token's distribution from the reference's (B, T), nats.

        Args:
            hidden: The policy's hidden states (B, L, H).
            ref_states: The reference's states that predict each response token (B, T, H).
            rows: The sequences.
            shaping: How the responses were drawn.
        """
        states = response_states(hidden, rows.prompt_lengths, rows.response_mask.shape[1])
        lm = self.causal_lm
        # Heads have no adapters: without a model of its own, the reference has the policy's.
        reference = lm if self.reference_lm is None else self.reference_lm
        arguments = (lm, states, reference, ref_states, rows.response_mask, shaping)
        return within(lm, lambda: within(reference, lambda: head_kl(*arguments)))

    def response_logprobs(self, role: Role, rows: TokenRows, shaping: Shaping) -> TokenLogprobs:
        """Log-probabilities and entropies (B, T) of responses, in one pass."""

        def work(lm: PreTrainedModel) -> TokenLogprobs:
            hidden = self.hidden(role, rows.input_ids, rows.lengths).last
            return self.logprobs(role, hidden, *rows[:3], shaping)

        return self.within(role, work)

    @hushed()
    def save_pretrained(self, folder: str | Path, merge: bool = False) -> None:
        """Write the actor: a peft adapter folder, or a whole transformers model.

        Args:
            folder: Where to.
            merge: Add the adapters to the weights; they stay so, since this is the end of a run.

        Raises:
            ValueError: Adapters of a quantised base are to be merged.
        """
        if merge and isinstance(self.lm, PeftModel) and self.start.quantization is not None:
            raise ValueError(
                f"merge: expected adapters of an unquantised base, got those of a {self.start.quantization} base: "
                "merged weights would be rounded anew, or be those of another policy. Export the adapter."
            )
        if isinstance(self.lm, PeftModel) and merge:
            self.lm.set_adapter("actor")
            self.lm.merge_and_unload().save_pretrained(folder)
        elif isinstance(self.lm, PeftModel):
            # peft would put the adapter into a subfolder of its name; readers expect it at the top.
            with TemporaryDirectory(dir=_parent(folder)) as scratch:
                self.lm.save_pretrained(scratch, selected_adapters=["actor"])
                shutil.copytree(Path(scratch) / "actor", folder, dirs_exist_ok=True)
        else:
            self.lm.save_pretrained(folder)


def _reference(base: Pretrained, lora: Lora | None) -> PreTrainedModel:
    """A frozen model of the base; float32 beside weights that are trained in it, unless quantised."""
    exact = replace(base, dtype="float32") if lora is None and base.quantization is None else base
    lm = load_causal_lm(exact)
    disable_dropout(lm)
    return cast("PreTrainedModel", freeze(lm))


def _parent(folder: str | Path) -> Path:
    parent = Path(folder).resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    return parent


def lora_config(lora: Lora, lm: PreTrainedModel, depth: int | None = None) -> LoraConfig:
    """The peft configuration of `lora` for this model, for its first `depth` blocks if given.

    Raises:
        ValueError: `top_layers` is not between 1 and the number of layers, or the head is to be adapted.
    """
    blocks = decoder_layers(cast("nn.Module", lm.base_model))
    depth = depth or len(blocks)
    top = len(blocks) if lora.top_layers is None else lora.top_layers
    if not 1 <= top <= len(blocks):
        raise ValueError(f"model.lora.top_layers: expected 1 … {len(blocks)}, got {top}")
    layers, targets = None, lora.target_modules
    linear = (nn.Linear, Conv1D)
    heads = {n.rpartition(".")[2] for n, m in lm.named_modules() if m is lm.get_output_embeddings()}
    if not isinstance(targets, str) and heads & set(targets):
        raise ValueError(f"model.lora.target_modules: expected layers inside the blocks, got the head {heads}")
    names = [f".{name}" for name, module in lm.named_modules() if isinstance(module, linear)]
    missing = [] if isinstance(targets, str) else [t for t in targets if not any(n.endswith(f".{t}") for n in names)]
    if missing:
        there = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(f"model.lora.target_modules: expected each to be one of {there}, got {missing}")
    if (top, depth) != (len(blocks), len(blocks)):
        layers = list(range(max(0, depth - top), depth))
        if targets == "all-linear":
            # peft takes either this word or a choice of layers, so the word is spelt out.
            targets = sorted({n.rpartition(".")[2] for n, m in blocks.named_modules() if isinstance(m, linear)})
    return LoraConfig(
        r=lora.rank,
        lora_alpha=cast("int", lora.alpha),
        lora_dropout=0.0,
        target_modules=targets,
        layers_to_transform=layers,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in blocks.modules()),
        task_type="CAUSAL_LM",
    )
