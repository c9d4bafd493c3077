"""What a vLLM server is refused for before it draws a response that is learned from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lit_vapo.functional import sampler_gap
from lit_vapo.models.generation import Sampling
from lit_vapo.models.policy import Policy
from lit_vapo.models.shaping import Shaping
from lit_vapo.models.vllm_client import Completion, VllmClient, request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words, numbers, signs, spaces and letters of several alphabets: what tokenizers differ in.
PROBE = "The film cost 12,345 €,\n\tand naïve viewers said: «it's 3.5/10» – λ = 日本!"
# Far enough from 1 to tell what was divided by it from what was not.
TEMPERATURE = 0.6
TOKENS = 16
RESPONSES = 4
# Nats per token that rounding of one data type against another explains, and that nobody needs to hear of.
ROUNDING = 1e-4


def check_served(client: VllmClient, policy: Policy, tokenizer: PreTrainedTokenizerBase, longest: int) -> str:
    """Look at what a server says of itself.

    Args:
        client: Talks to it.
        policy: Whose weights it is to have.
        tokenizer: The policy's tokenizer.
        longest: Most tokens of a prompt with its response.

    Returns:
        The name of its base model.

    Raises:
        ValueError: Its context is too short, or its tokens are others.
    """
    base = client.models()[0]
    if base.max_model_len is not None and base.max_model_len < longest:
        raise ValueError(
            f"model.generator: expected a server with room for {longest} tokens (data.max_prompt_length + "
            f"model.sampling.max_new_tokens), got one with --max-model-len {base.max_model_len}"
        )
    own = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    theirs = client.tokenize(base.id, PROBE)
    if own != theirs:
        raise ValueError(
            f"model.generator: expected a server of {policy.start.path!r}, with its vocabulary, got one of "
            f"{base.root or base.id!r} with another: {PROBE!r} is {own[:8]} … here ({len(own)} tokens) and "
            f"{theirs[:8]} … there ({len(theirs)})"
        )
    return base.id


@torch.no_grad()
def check_answers(
    draw: Callable[[list[dict[str, Any]]], list[Completion]],
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    longest: int,
    max_kl: float | None,
) -> None:
    """Let a server answer a probe, and compare its log-probabilities with the policy's.

    Args:
        draw: Asks the server.
        policy: Whose weights it has been given.
        tokenizer: The policy's tokenizer.
        model: What these weights are called there.
        longest: Most tokens of a prompt with its response.
        max_kl: Largest KL, nats per token, or `None` for any.

    Raises:
        ValueError: Its log-probabilities are those before the temperature, or of other weights.
    """
    prompt = tokenizer(PROBE, add_special_tokens=False)["input_ids"][: longest // 2]
    sampling = Sampling(min(TOKENS, longest - len(prompt)), TEMPERATURE, num_responses=RESPONSES)
    rows = draw([request(prompt, sampling, [], model, seed=0)])
    device = policy.causal_lm.device
    longest = max(len(row.ids) for row in rows)
    lengths = torch.tensor([len(row.ids) for row in rows], device=device)
    mask = torch.arange(longest, device=device) < lengths[:, None]
    padded = [prompt + row.ids + [0] * (longest - len(row.ids)) for row in rows]
    ids, prompts = torch.tensor(padded, device=device), torch.full_like(lengths, len(prompt))
    said = torch.zeros(mask.shape, device=device)
    said[mask] = torch.tensor([x for row in rows for x in row.logprobs], device=device)
    hidden = policy.hidden("actor", ids, prompts + lengths).last

    def gap(temperature: float) -> float:
        found = policy.logprobs("actor", hidden, ids, prompts, mask, Shaping(temperature))
        return float(sampler_gap(found.logprobs, said, mask).kl)

    found, raw = gap(TEMPERATURE), gap(1.0)
    if raw < found / 2 and found > ROUNDING:
        raise ValueError(
            "model.generator: expected log-probabilities after the temperature (--logprobs-mode processed_logprobs), "
            f"got those before it: at temperature {TEMPERATURE:g} they are {found:.3g} nats per token from the "
            f"policy's, and {raw:.3g} from those at 1"
        )
    if max_kl is not None and not found <= max_kl:
        raise ValueError(
            f"model.generator: expected a server of {policy.start.path!r}, got one with other weights: "
            f"KL(sampler‖learner) of a probe is {found:.3g} nats per token, above max_kl = {max_kl:g}"
        )
    if found > ROUNDING:
        kind = str(policy.causal_lm.dtype).removeprefix("torch.")
        held = kind if policy.start.quantization is None else f"{kind}, {policy.start.quantization}"
        warnings.warn(
            f"The vLLM server samples from a policy a little other than the learner's ({held}): KL(sampler‖learner) "
            f"of a probe is {found:.2g} nats per token. model.update.sampler_ratio_cap corrects for it; an equal dtype "
            "and no quantisation would make it smaller.",
            stacklevel=2,
        )
