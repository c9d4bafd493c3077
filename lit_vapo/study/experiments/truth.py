"""What a study on a small language model takes for true: a frozen reward, known of every response."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
        save_file({name: x.contiguous() for name, x in known.items()}, Path(folder) / NAME)

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
