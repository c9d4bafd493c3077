"""What a study on a small language model takes for true: a frozen reward, known of every response."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "true_reward.safetensors"


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
        prompt_ids: Identities (P,) int64 of the prompts, as in `PromptBatch`, or None.
        prompt_values: True return (P,) of the reference on each of them, or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        reference: Tensor,
        response_tokens: int | None = None,
        prompt_ids: Tensor | None = None,
        prompt_values: Tensor | None = None,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.reference = reference
        self.response_tokens = response_tokens
        self.prompt_ids = prompt_ids
        self.prompt_values = prompt_values

    @classmethod
    def along(cls, direction: Tensor, reference: Tensor, response_tokens: int | None = None) -> TrueReward:
        """The reward that rises in a direction (H,), centred and scaled on the reference's features (N, H)."""
        score = reference @ direction
        return cls(direction / score.std(), score.mean() / score.std(), reference, response_tokens)

    def __call__(self, features: Tensor) -> Tensor:
        """True reward (B,) of features (B, H)."""
        return 2 * ((features @ self.weight - self.bias) / 2).tanh()

    @property
    def reference_return(self) -> float:
        """True return of the reference over all prompts, or over the responses there are."""
        return float((self(self.reference) if self.prompt_values is None else self.prompt_values).mean())

    def ease_of(self, prompt_ids: Tensor) -> float:
        """How much more the reference earns on these prompts (B,) than on all; 0 where that is not known.

        Raises:
            ValueError: A prompt is not known.
        """
        if self.prompt_ids is None or self.prompt_values is None:
            return 0.0
        same = prompt_ids[:, None] == self.prompt_ids
        if not bool(same.any(1).all()):
            raise ValueError("data/prompts.jsonl: expected the prompts that true_reward was prepared with, got others")
        return float(self.prompt_values[same.int().argmax(1)].mean()) - self.reference_return

    def save(self, folder: str | Path) -> None:
        """Write it into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        known = {name: torch.as_tensor(x).contiguous() for name, x in vars(self).items() if x is not None}
        save_file(known, Path(folder) / NAME)

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
        tokens = known.pop("response_tokens", None)
        return cls(**known, response_tokens=None if tokens is None else int(tokens))
