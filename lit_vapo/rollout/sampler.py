"""Whether responses are those of the policy: what a sampler with weights of its own is asked after each batch."""

from __future__ import annotations

from torch import Tensor

from lit_vapo.functional import SamplerGap, sampler_gap
from lit_vapo.models.generation import Generated
from lit_vapo.models.processes import of_all, rows_of_all


def refuse_stale(found: int | None, version: int) -> None:
    """Refuse responses of other weights than the policy's, in all processes if in one.

    Args:
        found: Version that the sampler says it used; `None` if it has no weights of its own.
        version: Version of the policy's weights.

    Raises:
        ValueError: They differ; the message names both.
    """
    if found is None:
        return
    for told in of_all(found):
        if told != version:
            raise ValueError(
                f"model.generator: expected responses of the weights of version {version} (weight updates so far), "
                f"got those of version {told}"
            )


def compared(
    generated: Generated, logprobs: Tensor, response_mask: Tensor, max_kl: float | None
) -> tuple[Tensor | None, SamplerGap | None]:
    """What a sampler says of its tokens, cut to the rows of a rollout, and how far that is from the learner's figures.

    Args:
        generated: Responses to compare.
        logprobs: Log-probabilities under the model that learns (B, T).
        response_mask: True at response tokens (B, T).
        max_kl: Largest KL, nats per token, or `None` for any.

    Returns:
        Log-probabilities (B, T) and the gap over all processes; nothing where the sampler says none.

    Raises:
        ValueError: The two are further apart than `max_kl`: the sampler has other weights than the learner.
    """
    if generated.logprobs is None:
        return None, None
    said = generated.logprobs[:, : response_mask.shape[1]]
    gap = sampler_gap(logprobs, said, response_mask, rows_of_all)
    # NaN is not below anything.
    if max_kl is not None and not float(gap.kl) <= max_kl:
        raise ValueError(
            f"model.generator: expected responses of the policy as it is now, got those of another one: "
            f"KL(sampler‖learner) is {float(gap.kl):.3g} nats per token, above max_kl = {max_kl:g} (largest ratio of a "
            f"token: {float(gap.ratio_max):.3g}). The sampler has kept older weights, or computes in another precision."
        )
    return said, gap
