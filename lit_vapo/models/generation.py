"""What responses are drawn from and by whom: the contract of all generators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers import GenerationConfig

from lit_vapo.functional import TokenLogprobs
from lit_vapo.models.policy import Policy, Role
from lit_vapo.models.shaping import Shaping
from lit_vapo.models.vocabulary import vocabulary_size
from lit_vapo.ranges import PositiveFloat, PositiveInt, check_ranges
from lit_vapo.stops import stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Sampling:
    """How responses are drawn.

    Only the temperature and the minimum length shape the distribution, and every log-probability and entropy of PPO is
    taken under that same distribution. Top-k, top-p and penalties are always off: they would make the log-probabilities
    of the sampled tokens differ from those PPO computes.

    Args:
        max_new_tokens: Longest response.
        temperature: The logits are divided by it, in sampling and in every log-probability alike.
        stop_token_ids: Tokens that end a response, besides the model's own end-of-sequence tokens.
        num_responses: Responses to each prompt. They are rows of the batch, those of a prompt together.
        stop_strings: Strings that end a response, with the token that completes one; the prompt does not count.
        min_new_tokens: Stop tokens cannot be drawn as one of this many first tokens. Refused together with
            `stop_strings`: what a string rules out depends on the tokens before, so no fixed set of tokens could be
            held back in sampling and in the log-probabilities alike.

    Raises:
        ValueError: A number is out of its range, a stop string is empty, or stop strings meet a minimum length.
    """

    max_new_tokens: PositiveInt = 64
    temperature: PositiveFloat = 1.0
    stop_token_ids: list[int] | None = None
    num_responses: PositiveInt = 1
    stop_strings: list[str] | None = None
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        check_ranges(Sampling, vars(self), "sampling.")
        if not 0 <= self.min_new_tokens < self.max_new_tokens:
            raise ValueError(
                f"sampling.min_new_tokens: expected 0 … {self.max_new_tokens - 1} (below max_new_tokens: else no "
                f"response could end by itself), got {self.min_new_tokens}"
            )
        if isinstance(self.stop_strings, str) or "" in (self.stop_strings or []):
            raise ValueError(f"sampling.stop_strings: expected a list of non-empty strings, got {self.stop_strings!r}")
        if self.stop_strings and self.min_new_tokens:
            raise ValueError(
                f"sampling.min_new_tokens: expected 0 with stop_strings, got {self.min_new_tokens}; a minimum length "
                "holds back stop tokens only"
            )

    def shaping(self, stops: list[int]) -> Shaping:
        """What this makes of the logits of a model that these tokens stop."""
        return Shaping(self.temperature, self.min_new_tokens, tuple(stops))


class Generated(NamedTuple):
    """Sampled responses; n to each of B prompts, response j to prompt i in row i·n + j.

    Attributes:
        response_ids: Token ids (B·n, T), anything after the end of a response.
        response_lengths: Tokens of each response (B·n,), the token that ended it included.
        stopped: Whether a stop token or a stop string ended the response (B·n,).
        logprobs: Log-probabilities that the sampler says its tokens had when it drew them (B·n, T), under the
            sampling's temperature and minimum length; anything after the end of a response. `None` if it does not say.
        weights_version: Version of the weights that it says it sampled with; `None` if it has no weights of its own.
        own: What the model that was given, policy or reference, computed in float32 while it drew (B·n, T):
            log-probabilities and entropies that nobody has to compute again. `None` from a sampler with other weights
            or another precision.
    """

    response_ids: Tensor
    response_lengths: Tensor
    stopped: Tensor
    logprobs: Tensor | None = None
    weights_version: int | None = None
    own: TokenLogprobs | None = None


class Generator(ABC):
    """Draws responses from a language model, exactly from the distribution that `Sampling` says.

    Whoever calls it has switched the model's adapters to the role that answers. A generator that keeps weights of its
    own takes them in `open` and `sync`, which do nothing else: one that only samples needs `__call__` alone. Results
    must be reproducible from torch's seed, as far as rounding is.

    Attributes:
        max_kl: Largest KL(sampler‖learner), nats per token, that is taken for rounding; `None` for any. It is looked at
            where responses come with log-probabilities.
    """

    max_kl: float | None = None

    def open(  # noqa: B027
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        longest: int,
        folder: Path,
        version: int,
    ) -> None:
        """Get ready to answer, before the first prompt; all processes of a run call it together.

        Args:
            policy: Whose weights answer.
            tokenizer: Its tokenizer.
            sampling: How responses are drawn.
            longest: Most tokens of a prompt with its response.
            folder: The run's, for files.
            version: Version of the policy's weights.

        Raises:
            ValueError: It cannot answer for this policy; the message says why.
        """

    def sync(self, policy: Policy, role: Role, version: int) -> None:  # noqa: B027
        """Get ready to answer in a role; all processes call it together, before each batch of prompts.

        Args:
            policy: Whose weights answer.
            role: `actor` or `reference`.
            version: Version of the policy's weights. Equal versions have equal weights.

        Raises:
            ValueError: It cannot take these weights.
        """

    def close(self) -> None:  # noqa: B027
        """Let go of what `open` and `sync` took; may be called again, or without them."""

    @abstractmethod
    def __call__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        sampling: Sampling,
        stops: list[int],
    ) -> Generated:
        """Respond to each prompt.

        Args:
            lm: The language model, adapters switched as wanted.
            tokenizer: Its tokenizer.
            prompt_ids: Token ids (B, P), left-padded with anything.
            prompt_lengths: Tokens of each prompt (B,), at least 1.
            sampling: How to draw.
            stops: Tokens that end a response (see `stop_ids`).

        Returns:
            `sampling.num_responses` responses to each prompt, none of them empty.
        """


def stop_ids(lm: PreTrainedModel, sampling: Sampling, eos_token_id: int | None) -> list[int]:
    """All tokens that end a response: the model's, the tokenizer's and the user's.

    Raises:
        ValueError: The user's are no tokens of the model, or there is none that a minimum length could hold back.
    """
    text, size = lm.config.get_text_config(), vocabulary_size(lm.config)
    wrong = [i for i in sampling.stop_token_ids or [] if not 0 <= i < size]
    if wrong:
        raise ValueError(f"sampling.stop_token_ids: expected token ids 0 … {size - 1} of the model, got {wrong}")
    configured = (lm.generation_config, lm.config, text)
    sources = (getattr(config, "eos_token_id", None) for config in configured)
    # What the model has no embedding for it never writes.
    ids = [i for i in stop_tokens(*sources, eos_token_id, sampling.stop_token_ids) if i < size]
    if sampling.min_new_tokens and not ids:
        raise ValueError(
            f"sampling.min_new_tokens: expected 0 for a model without stop tokens, got {sampling.min_new_tokens}"
        )
    return ids


def generation_config(sampling: Sampling, stops: list[int], **others: Any) -> GenerationConfig:
    """The sampling, as transformers writes it down.

    Args:
        sampling: How responses are drawn.
        stops: Tokens that end a response (see `stop_ids`).
        others: Further settings, and others in place of these.
    """
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": sampling.max_new_tokens,
        "min_new_tokens": sampling.min_new_tokens or None,
        "stop_strings": sampling.stop_strings,
        "eos_token_id": stops or None,
        # Lengths tell where a response ends, so any token will do.
        "pad_token_id": (stops or [0])[0],
    }
    return GenerationConfig(**settings | others)
