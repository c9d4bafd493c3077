"""What a study on a language model takes for true, and what it was prepared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.tensors import write_tensors
from lit_vapo.rewards.reward_model import FeatureSpec
from lit_vapo.types import TextReward

NAME = "true_reward.safetensors"


class PromptValues(NamedTuple):
    """What the reference earns on each prompt.

    Attributes:
        ids: Identities (P,) int64, as in `PromptBatch`.
        values: True return (P,) of the reference, averaged over several responses.
    """

    ids: Tensor
    values: Tensor

    def ease(self, ids: Tensor) -> float:
        """How much more the reference earns on these prompts (B,) than on all.

        Raises:
            ValueError: A prompt is not known.
        """
        same = ids[:, None] == self.ids
        if not bool(same.any(1).all()):
            raise ValueError("prompts: expected those that the study was prepared with, got others")
        return float(self.values[same.int().argmax(1)].mean() - self.values.mean())


class TrueReward:
    """A true reward of responses, and the features of responses that the reference gave.

    The true reward is a fixed function of the text, 2·tanh(½·(w·φ − b)), with φ the frozen reference's last hidden
    states, averaged over the response. It is smooth and within ±2; w·φ − b has mean 0 and standard deviation 1 over
    responses of the reference.

    Args:
        weight: w (H,), in units of reward per unit of feature.
        bias: b (), in units of reward.
        reference: Features (N, H) of responses of the reference.
        response_tokens: Most tokens of these responses, or None if nobody knows.
        prompts: What the reference earns on each prompt, or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        reference: Tensor,
        response_tokens: int | None = None,
        prompts: PromptValues | None = None,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.reference = reference
        self.response_tokens = response_tokens
        self.prompts = prompts

    @classmethod
    def along(cls, direction: Tensor, reference: Tensor, response_tokens: int | None = None) -> TrueReward:
        """The reward that rises in a direction (H,), centred and scaled on the reference's features (N, H)."""
        score = reference @ direction
        return cls(direction / score.std(), score.mean() / score.std(), reference, response_tokens)

    def __call__(self, features: Tensor) -> Tensor:
        """True reward (B,) of features (B, H)."""
        return 2 * ((features @ self.weight - self.bias) / 2).tanh()

    def save(self, folder: str | Path) -> None:
        """Write it into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        known = {"weight": self.weight, "bias": self.bias, "reference": self.reference}
        if self.response_tokens is not None:
            known["response_tokens"] = torch.tensor(self.response_tokens)
        if self.prompts is not None:
            known |= {"prompt_ids": self.prompts.ids, "prompt_values": self.prompts.values}
        write_tensors(Path(folder) / NAME, known)

    @classmethod
    def load(cls, folder: str | Path) -> TrueReward:
        """Read it from a folder.

        Raises:
            ValueError: There is none.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            raise ValueError(f"expected a folder with {NAME}, got {str(folder)!r}")
        known = load_file(path)
        tokens = int(known["response_tokens"]) if "response_tokens" in known else None
        prompts = PromptValues(known["prompt_ids"], known["prompt_values"]) if "prompt_ids" in known else None
        return cls(known["weight"], known["bias"], known["reference"], tokens, prompts)


@dataclass
class Truth:
    """What a study takes for true, and all that it needs to know of its task.

    Attributes:
        spec: What ensembles read of which language model: the one that is aligned.
        prompts_file: Where the prompts are.
        reference: Features (N, H) of responses of the reference, which ensembles are calibrated on.
        reward: The true reward of features, or None where a judge of texts knows it.
        judge: The judge whose mean is the true return, or None where `reward` knows it.
        response_tokens: Most tokens of the reference's responses, or None if nobody knows.
        prompts: What the reference earns on each prompt, or None if nobody knows.

    Raises:
        ValueError: Nobody knows what is true, or two do.
    """

    spec: FeatureSpec
    prompts_file: Path
    reference: Tensor
    reward: TrueReward | None = None
    judge: TextReward | None = None
    response_tokens: int | None = None
    prompts: PromptValues | None = None

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.judge is None):
            raise ValueError(f"truth: expected a reward or a judge, got {self.reward} and {self.judge}")

    @classmethod
    def prepared(cls, folder: Path) -> Truth:
        """That of a folder with `base` (the language model), `data/prompts.jsonl` and `true_reward` (`TrueReward`)."""
        true = TrueReward.load(folder / "true_reward")
        spec = FeatureSpec(Pretrained(str(folder / "base")), pooling="mean")
        file = folder / "data" / "prompts.jsonl"
        return cls(spec, file, true.reference, true, None, true.response_tokens, true.prompts)

    @property
    def reference_return(self) -> float:
        """True return of the reference, on all prompts.

        Raises:
            ValueError: A judge knows what is true, and nobody has asked it about each prompt.
        """
        if self.prompts is not None:
            return float(self.prompts.values.mean())
        if self.reward is None:
            raise ValueError("truth.prompts: expected what the judge says of the reference, got none")
        return float(self.reward(self.reference).mean())
