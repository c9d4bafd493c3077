"""Where the members of an ensemble live and run while a policy is aligned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_vapo.models.exported import same_model
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import model_config
from lit_vapo.models.trunk import Tap
from lit_vapo.models.vocabulary import same_language, vocabulary_size
from lit_vapo.rewards.ensemble_file import EnsembleConfig
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.rewards.source import Responses


class Placement(ABC):
    """Gives an ensemble the features of responses.

    Args:
        model: The ensemble.
    """

    taps: tuple[Tap, ...] = ()

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    @abstractmethod
    def features(self, responses: Responses) -> Tensor:
        """Features (B, H) of responses, or (B, K, H) where members differ in them."""


class SharedTrunk(Placement):
    """Members that read frozen hidden states of the policy's own base: the reference's pass has them already."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__(model)
        spec = model.spec
        self.taps = (Tap(spec.layer, spec.pooling, tuple(spec.ends)),)

    def features(self, responses: Responses) -> Tensor:
        """Those of the reference's pass."""
        return responses.pooled[self.taps[0]]


class OwnTrunks(Placement):
    """Members with a backbone of their own, or with one each.

    They read the policy's tokens if these are theirs, and otherwise what their own tokenizer makes of the texts.
    """

    def __init__(self, model: RewardModel) -> None:
        super().__init__(model)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._reads_tokens: bool | None = None

    def features(self, responses: Responses) -> Tensor:
        """Those of a pass, or several, of their own.

        Raises:
            ValueError: Prompts are messages, and their tokenizer has no chat template, or one that refuses them.
        """
        tokenizer = self._tokenizer = self._tokenizer or self.model.load_tokenizer()
        if self._reads_tokens is None and responses.tokenizer is not None:
            largest = vocabulary_size(model_config(self.model.spec.base))
            fits = largest >= responses.vocabulary_size and same_language(responses.tokenizer, tokenizer)
            self._reads_tokens = fits
        reads_tokens = self._reads_tokens and responses.rows is not None
        sequences = responses.sequences if reads_tokens else responses.encode(tokenizer, self.model.spec.base.path)
        return compute_features(self.model, sequences, responses.device).to(responses.device)


class AdaptedTrunk(OwnTrunks):
    """Members that hang their adapters into the policy's own base, so that it is in memory once."""

    def __init__(self, model: RewardModel, policy: Policy) -> None:
        super().__init__(model)
        model.borrow(policy)


def place(
    folder: Path, config: EnsembleConfig, kind: type[RewardHead], policy: Policy | None, trust: list[str] | None
) -> Placement:
    """Load an ensemble to where it costs least.

    Args:
        folder: The ensemble's folder.
        config: What it says of itself.
        kind: Its estimator.
        policy: The policy to be aligned, if there is one.
        trust: Code that the ensemble may ask for.
    """
    spec = config.spec
    same = policy is not None and same_model(spec.base, policy.base)
    if same and reads_frozen_states(config, kind):
        return SharedTrunk(RewardModel.from_pretrained(folder, with_backbone=False, trust=trust))
    # Members of a truncated base keep one of their own: the blocks above would run for nothing, K times over.
    if policy is not None and same and not (kind.shares_features or kind.owns_backbones) and spec.layer is None:
        model = policy.lend(lambda backbone: RewardModel.from_pretrained(folder, lent=backbone, trust=trust))
        return AdaptedTrunk(model, policy)
    return OwnTrunks(RewardModel.from_pretrained(folder, trust=trust))


def reads_frozen_states(config: EnsembleConfig, kind: type[RewardHead]) -> bool:
    """Whether all members read the hidden states of the base as it is."""
    return kind.shares_features and not config.own_backbone
