"""What the heads of the reward stage read: a backbone, one of its layers, and features that are kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lit_vapo.data.collate import pair_labels
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.data.stopping import find_stops
from lit_vapo.functional import held_out_nll
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import (
    Pretrained,
    check_tokenizer,
    cut_off,
    decoder_layers,
    freeze,
    hidden_size,
    load_backbone,
    load_causal_lm,
    load_tokenizer,
    model_config,
    place,
)
from lit_vapo.models.sharding import Sharing
from lit_vapo.models.vocabulary import check_embeddings
from lit_vapo.rewards.features import (
    compute_features,
    compute_layers,
    feature_key,
    feature_path,
    load_features,
    load_responses,
    sampling_key,
    save_features,
    save_responses,
)
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.rollout import sample_references
from lit_vapo.stages.guards import check_context, check_precision
from lit_vapo.stages.reward.evaluation import EvaluatedRewards
from lit_vapo.stages.seeding import seeded
from lit_vapo.stops import stop_tokens
from lit_vapo.types import FeaturePairs, TokenSequence

Layer = int | Literal["auto"] | None
READS_KEY = "lit_vapo_reads"
# Pairs that a layer is judged on, in seconds.
JUDGED_PAIRS = 2048
# Responses that are cut in half, to see what that does to their rewards.
CUT_RESPONSES = 32


class BuiltRewards(EvaluatedRewards):
    """Loads what a reward ensemble reads, and where nothing trains it, turns it into features once."""

    layer: Layer
    spec: FeatureSpec
    freeze_backbone: bool
    reference: Pretrained | None
    reference_sampling: Sampling
    num_reference: int
    feature_cache: str | None
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self.backbone: Any = None
        self.reference_inputs: list[TokenSequence] | Tensor | None = None

    @property
    def frozen_features(self) -> bool:
        """Whether no training step changes the features, so that they need no gradient."""
        return self.head.has_fixed_features(self.freeze_backbone)

    @property
    def device_of_run(self) -> torch.device:
        """Where this process computes, known before the model is moved there."""
        return self.trainer.strategy.root_device if self._trainer is not None else self.device

    def reward_model(self) -> RewardModel:
        """The reward model as it stands; without backbone where features are cached."""
        return RewardModel(self.spec, self.head, self.backbone)

    def configure_model(self) -> None:
        """Load the backbone, or where nothing trains it, see to it that pairs come as features."""
        if self._trainer is not None:
            check_precision(self.trainer.precision, "32-true", "bf16-mixed", "16-mixed")
            if self.pairs is not None and self.pairs.streams and self.head.settles:
                kind = type(self.head).__name__
                raise ValueError(f"data.streaming: expected false for {kind}, which holds all training pairs, got true")
        if self.head.hidden_size is None:
            self.head.build(hidden_size(self.spec.base))
        elif self.backbone is not None and not self.frozen_features:
            return
        if self._trainer is None and self.frozen_features:
            # To export, the head is all that is needed.
            return
        datamodule = self.pairs
        if datamodule is not None:
            config = model_config(self.spec.base)
            check_context(config, datamodule.longest_pair())
            check_embeddings(config, datamodule.text_tokenizer, *datamodule.largest_token())
        if self._trainer is not None:
            tokenizer = load_tokenizer(self.spec.base) if datamodule is None else datamodule.text_tokenizer
            told = () if datamodule is None else datamodule.encoder.stops
            more, key = self.reference_sampling.stop_token_ids, "model.reference_sampling.stop_token_ids"
            self.spec.ends = list(stop_tokens(told, find_stops(self.spec.base.path, tokenizer, more, key)))
            if self.trainer.state.fn == "fit" and datamodule is not None and self.reference is not None:
                self.reference_inputs = self._sample_reference(datamodule)
        if datamodule is not None and self.frozen_features and not datamodule.streams:
            # Asked for when batches are: what is read may be said by a checkpoint, which is loaded after this.
            datamodule.ask_for_features(self._pair_features)
        else:
            # Batches of tokens, encoded as they come.
            self.layer = self.spec.layer
            self.backbone = self._load_backbone()
            self.share(self.share_backbones)

    @abstractmethod
    def share_backbones(self, sharing: Sharing) -> None:
        """Share the backbone, or the members' backbones, with other processes."""

    def _load_backbone(self) -> Any:
        backbone = freeze(load_backbone(self.spec.base, self.spec.layer))
        if self.frozen_features:
            return place(cast("Any", backbone), self.device_of_run)
        return self.head.in_training(backbone, decoder_layers(backbone))

    # What is read of a sequence: the same in training, in the checkpoint and in the export.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the heads read."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[READS_KEY] = self._reads()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read what the checkpoint's heads read.

        Raises:
            ValueError: Another layer or pooling was asked for.
        """
        super().on_load_checkpoint(checkpoint)
        # Heads that were trained before this was noted read the end of a response as well.
        saved = {**self._reads(), "ends": [], **checkpoint.get(READS_KEY, {})}
        if self._trainer is None or self.layer == "auto":
            self.layer = self.spec.layer = saved["layer"]
        self.spec.ends = saved["ends"]
        if saved != self._reads():
            raise ValueError(f"checkpoint: expected heads that read {self._reads()}, got some that read {saved}")

    def _reads(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.spec).items() if name != "base"}

    # Features that are computed once.

    def on_fit_start(self) -> None:
        """Features of the reference's responses, where features are kept."""
        if self._keeps_features and isinstance(self.reference_inputs, list):
            self._choose_layer()
            self.reference_inputs = self._features(self.reference_inputs, "reference")

    def on_train_start(self) -> None:
        """Let go of the backbone, whose features are kept."""
        self._let_go()

    def on_validation_start(self) -> None:
        """Score with what the training pairs say so far."""
        self._let_go()
        super().on_validation_start()

    def on_test_start(self) -> None:
        """Let go of the backbone, whose features are kept."""
        self._let_go()

    @property
    def _keeps_features(self) -> bool:
        return self.frozen_features and self.pairs is not None and not self.pairs.streams

    def _let_go(self) -> None:
        if self._keeps_features:
            self.backbone = None

    def _pair_features(self, split: str) -> tuple[Tensor, Tensor]:
        """Features of the chosen and of the rejected responses of a split."""
        self._choose_layer()
        assert self.pairs is not None
        pairs = self.pairs.preferences(split)
        if split in ("val", "test"):
            # While the backbone is here; `cut_rewards` finds them in the cache.
            self._features(self._cut(split), f"{split} (cut in half)")
        chosen, rejected = self._features([*pairs.chosen, *pairs.rejected], split).split(len(pairs.chosen))
        return chosen, rejected

    def _cut(self, split: str) -> list[TokenSequence]:
        """Some responses of a split, and then the same ones cut in half."""
        assert self.pairs is not None
        whole = self.pairs.preferences(split).chosen[:CUT_RESPONSES]
        ends = set(self.spec.ends)
        cut = []
        for ids, prompt in whole:
            length = len(ids) - prompt - (ids[-1] in ends)
            cut.append(TokenSequence(ids[: prompt + max(1, length // 2)], prompt))
        return [*whole, *cut]

    @torch.no_grad()
    def cut_rewards(self, split: str) -> tuple[Tensor, Tensor] | None:
        """Rewards of some responses of a split, whole and cut in half; `None` with somebody's own loaders."""
        if self.pairs is None:
            return None
        sequences, name = self._cut(split), f"{split} (cut in half)"
        features = (
            self._features(sequences, name)
            if self._keeps_features
            else compute_features(self.reward_model(), sequences, self.device)
        )
        rewards = self.head(features.to(self.device)).mean.cpu()
        return rewards[: len(rewards) // 2], rewards[len(rewards) // 2 :]

    def _choose_layer(self) -> None:
        """Read the layer from which the validation pairs are predicted best; the last where there are none.

        Layers are tried once, when training starts from nothing.
        """
        datamodule = self.pairs
        assert datamodule is not None
        if self.layer != "auto":
            return
        self.layer = self.spec.layer
        if self.trainer.state.fn != "fit":
            return
        count = int(model_config(self.spec.base).num_hidden_layers)
        if not all(datamodule.preference_rows(split) for split in ("train", "val")):
            self.print(f"layer: the last of {count}, since there are no validation pairs to choose one by")
            return
        inner = sorted({-(-count * quarter // 4) for quarter in (1, 2, 3)} - {count})
        layers = [*inner, None]
        parts = []
        for split in ("train", "val"):
            pairs, rows = datamodule.preferences(split), datamodule.preference_rows(split)
            each = self._layer_features([*pairs.chosen, *pairs.rejected], split, layers)
            kept, labels = slice(JUDGED_PAIRS), pair_labels(rows[:JUDGED_PAIRS])
            sides = [features.split(len(pairs.chosen)) for features in each]
            parts.append([FeaturePairs(chosen[kept], rejected[kept], labels) for chosen, rejected in sides])
        nlls = [float(held_out_nll(*pair)) for pair in zip(*parts, strict=True)]
        # Processes may round differently, and must not read different layers.
        best = self.trainer.strategy.broadcast(layers[nlls.index(min(nlls))])
        tried = ", ".join(f"{layer or count} ({nll:.3f})" for layer, nll in zip(layers, nlls, strict=True))
        self.print(f"layer: {best or count}, by the NLL of the validation pairs: {tried}; model.layer sets another")
        self.layer = self.spec.layer = best
        if best is not None and self.backbone is not None:
            cut_off(self.backbone, best)

    def _features(self, sequences: list[TokenSequence], name: str) -> Tensor:
        (features,) = self._layer_features(sequences, name, [self.spec.layer])
        return features

    def _layer_features(self, sequences: list[TokenSequence], name: str, layers: Sequence[int | None]) -> list[Tensor]:
        """Features of each layer from the cache; the first process computes what is missing, in one pass."""
        folder = self._cache
        keys = {layer: feature_key(replace(self.spec, layer=layer), sequences) for layer in layers}
        missing = [layer for layer in layers if not feature_path(folder, keys[layer]).is_file()]
        if self.trainer.is_global_zero and missing:
            self.print(f"features: {len(sequences)} sequences of the {name} split")
            if self.backbone is None:
                self.backbone = self._load_backbone()
            found = compute_layers(self.reward_model(), sequences, self.device_of_run, missing)
            for layer, features in zip(missing, found, strict=True):
                save_features(folder, keys[layer], features)
        self.trainer.strategy.barrier()
        return [cast("Tensor", load_features(folder, keys[layer])) for layer in layers]

    def _sample_reference(self, datamodule: PreferenceDataModule) -> list[TokenSequence]:
        """Responses of the reference policy, the same in every process."""
        assert self.reference is not None
        check_tokenizer(datamodule.text_tokenizer, self.reference, "model.reference")
        batches = datamodule.prompt_batches("train", self.num_reference)
        key = sampling_key(self.reference, self.reference_sampling, self.seed, [b.input_ids for b in batches])
        # Processes that look at different times find different things, so the first one looks.
        found = self.trainer.strategy.broadcast(load_responses(self._cache, key))
        if found is None:
            self.print(f"reference: sampling {self.num_reference} responses to calibrate the ensemble on")
            lm = place(load_causal_lm(self.reference, "model.reference.path"), self.device_of_run)
            with seeded(self.seed):
                found = sample_references(lm, datamodule.text_tokenizer, batches, self.reference_sampling)
            if self.trainer.is_global_zero:
                save_responses(self._cache, key, found)
        return found

    @property
    def _cache(self) -> Path:
        """Where features and the reference's responses are kept."""
        return Path(self.feature_cache or Path(self.trainer.default_root_dir) / "features")
