"""Public reward models as the members of an ensemble."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Pretrained, load_tokenizer
from lit_vapo.models.sequence_classifier import classify, count_labels, load_classifier
from lit_vapo.models.trunk import length_mask
from lit_vapo.models.vocabulary import vocabulary_size
from lit_vapo.rewards.normalised import NormalisedSource
from lit_vapo.rewards.normaliser import Normaliser
from lit_vapo.rewards.pretrained_file import PretrainedConfig, read_normaliser, read_trusted_rewards, write_rewards
from lit_vapo.rewards.source import Responses, Scorer

KEY = "reward.models"


class PretrainedRewards(NormalisedSource):
    """Public reward models as members: sequence classifiers of transformers, from folders or the hub.

    Each reads the texts with its own tokenizer and chat template, as a conversation that is over, and is read at its
    last token. So is a response that was cut off: a public model knows no other place, and what a missing end costs
    is `missing_eos_penalty`. Each member is centred and scaled on responses of the reference policy.

    Args:
        models: Several models with one label each, or one model, each label of which is a member. A higher number must
            mean a better response.
        resident: Hold all in memory. Off, they are read from disk one after another at each batch of responses, in the
            memory of the largest.

    Raises:
        ValueError: There is no model.
    """

    def __init__(self, models: list[Pretrained], resident: bool = True) -> None:
        super().__init__()
        if not models:
            raise ValueError(f"{KEY}: expected at least one public reward model, got none")
        self.models = models
        self.resident = resident
        self.networks = nn.ModuleList()
        self._num_members = len(models) if len(models) > 1 else None
        # How members were normalised when they were saved.
        self._held: dict[str, Tensor] = {}
        # Quantised weights stay where they were read to, and out of every state dict.
        self._quantised: dict[int, PreTrainedModel] = {}
        self._tokenizers: list[PreTrainedTokenizerBase] = []

    @property
    def num_members(self) -> int:
        """Members K."""
        if self._num_members is None:
            self._num_members = count_labels(self.models[0], f"{KEY}[0]")
        return self._num_members

    def check(self) -> None:
        """Look at the models' files, short of reading their weights.

        Raises:
            ValueError: One cannot be found, or is no whole model, or several do not have one label each.
        """
        labels = [count_labels(spec, key) for key, spec in _named(self.models)]
        for (key, spec), count in zip(_named(self.models), labels, strict=True):
            if len(labels) > 1 and count != 1:
                raise ValueError(
                    f"{key}: expected a reward model with one label, since it is one of several, got {spec.path!r} "
                    f"with {count}. A model with more stands alone: each label is then a member."
                )
        if self._held and len(self._held["reward_loc"]) != sum(labels):
            raise ValueError(
                f"{KEY}: expected {len(self._held['reward_loc'])} labels together, as when they were saved, got "
                f"{sum(labels)}"
            )

    def prepare(self, policy: Policy | None) -> None:
        """Load the models, or see that each can be loaded.

        Raises:
            ValueError: As `check`, or a model has weights that were never trained, or lacks a padding token that it
                needs.
        """
        if self.normaliser is not None:
            return
        self.check()
        super().prepare(policy)
        if self._held:
            self._normaliser.load_state_dict(self._held)
        self._tokenizers = [load_tokenizer(spec, f"{key}.path") for key, spec in _named(self.models)]
        for k, (key, spec) in enumerate(_named(self.models)):
            model = load_classifier(spec, key)
            if self.resident and spec.quantization is None:
                self.networks.append(model)
            elif self.resident:
                self._quantised[k] = model
            del model
            if not self.resident:
                _release()

    def scorers(self) -> list[Scorer]:
        """One for each model, resident or not."""
        held = [self._network(k, torch.get_default_device()) for k in range(len(self.models))]
        return [Scorer(model, partial(_logits, model)) for model in held]

    @property
    def centred(self) -> bool:
        """Models of different makers have neither an origin nor a unit in common."""
        return True

    def train(self, mode: bool = True) -> PretrainedRewards:
        """Stay in evaluation mode: nothing here learns."""
        return super().train(False)

    def raw(self, responses: Responses) -> tuple[Tensor, None]:
        """Raw rewards (B, K), each in its model's own unit.

        Raises:
            ValueError: A text is too long for a model, a template refuses a prompt, or a reward is not finite.
        """
        return torch.cat([self._rewards_of(k, responses) for k in range(len(self.models))], dim=1), None

    def _rewards_of(self, k: int, responses: Responses) -> Tensor:
        """Those of model k (B, 1), or of all labels of the only model (B, K)."""
        spec, tokenizer = self.models[k], self._tokenizers[k]
        sequences = [s.ids for s in responses.encode(tokenizer, spec.path, closed=True)]
        model = self._network(k, responses.device)
        _check_lengths(sequences, tokenizer, model, spec)
        found = classify(model, sequences).to(responses.device)
        _check_finite(found, spec, responses)
        if not self.resident:
            del model
            _release()
        return found

    def _network(self, k: int, device: torch.device) -> PreTrainedModel:
        """Model k, on its device."""
        spec = self.models[k]
        if not self.resident:
            model = load_classifier(spec, f"{KEY}[{k}]")
            return model if spec.quantization is not None else cast("PreTrainedModel", model.to(device))
        if k in self._quantised:
            return self._quantised[k]
        place = sum(spec.quantization is None for spec in self.models[:k])
        return cast("PreTrainedModel", self.networks[place])

    # What lasts.

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that names the models, and holds how their rewards are normalised.

        Raises:
            FileExistsError: The folder already holds reward models.
        """
        config = PretrainedConfig(models=self.models, resident=self.resident, num_members=self.num_members)
        write_rewards(Path(folder), config, self.normaliser or Normaliser(self.num_members))

    @classmethod
    def from_pretrained(cls, folder: str | Path, trust: Sequence[str] | None = None) -> PretrainedRewards:
        """What `save_pretrained` wrote; the models themselves are loaded in `prepare`.

        Args:
            folder: The folder.
            trust: Models that may bring code of their own, by folder or hub name.

        Raises:
            ValueError: It is damaged, or asks for code it is not trusted with.
        """
        config = read_trusted_rewards(Path(folder), trust)
        source = cls(config.models, config.resident)
        source._num_members = config.num_members
        source._held = read_normaliser(Path(folder), config.num_members)
        return source


def _logits(model: PreTrainedModel, ids: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> Any:
    """A pass of right-padded rows, as `classify` makes it."""
    with torch.autocast(ids.device.type, enabled=False):
        return model(input_ids=ids, attention_mask=length_mask(lengths, ids.shape[1]).long()).logits


def _release() -> None:
    """Let go of a model before the next is read, which takes more than a name where its parts refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _named(models: Sequence[Pretrained]) -> Iterator[tuple[str, Pretrained]]:
    """Each model with its key."""
    return ((f"{KEY}[{k}]", spec) for k, spec in enumerate(models))


def _check_lengths(
    sequences: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, spec: Pretrained
) -> None:
    """Refuse what a model has no positions or no embeddings for: some would answer with nonsense, or bring CUDA down.

    Raises:
        ValueError: There is such a text; the message names its row.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    longest = min(int(positions), int(tokenizer.model_max_length))
    size = vocabulary_size(config)
    for row, ids in enumerate(sequences):
        if not 1 <= len(ids) <= longest:
            raise ValueError(
                f"row {row}: expected a prompt with its response of at most {longest} tokens for the reward model "
                f"{spec.path!r}, got {len(ids)}; shorten prompts (data.max_prompt_length) or responses "
                "(sampling.max_new_tokens)"
            )
        if max(ids) >= size:
            raise ValueError(
                f"row {row}: expected token ids below {size}, for which the reward model {spec.path!r} has "
                f"embeddings, got {max(ids)} from its tokenizer"
            )


def _check_finite(rewards: Tensor, spec: Pretrained, responses: Responses) -> None:
    bad = (~torch.isfinite(rewards)).any(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"row {row}: expected a finite reward from {spec.path!r}, got {rewards[row].tolist()} for "
            f"{responses.texts[row][:60]!r}"
        )
