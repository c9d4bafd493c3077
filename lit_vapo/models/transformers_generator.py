"""The generator that needs nothing but the model: `generate` of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from lit_vapo.functional import TokenLogprobs, draw
from lit_vapo.models.generation import Generated, Generator, Sampling, generation_config
from lit_vapo.models.sharding import is_sharded

_NEVER = torch.iinfo(torch.long).max


class TransformersGenerator(Generator):
    """Samples with `generate` of transformers, a few tokens at a time.

    Between two calls, responses that have ended leave the batch, and with them their keys and values. A prompt with
    several responses is read once; its keys and values are then copied.

    A model whose weights are sharded keeps all rows until the longest response of all processes has ended, since these
    have to take equally many steps.

    A model that computes in float32 leaves the log-probabilities of its tokens behind (`Generated.own`): a second pass
    would find the same, as far as rounding is.

    Args:
        drop_every: Tokens between two looks at which responses have ended; `null` keeps all rows to the last token of
            the longest.

    Raises:
        ValueError: `drop_every` is below 1.
    """

    def __init__(self, drop_every: int | None = 16) -> None:
        if drop_every is not None and drop_every < 1:
            raise ValueError(f"generator.drop_every: expected at least 1 or null, got {drop_every}")
        self.drop_every = drop_every

    @torch.no_grad()
    def __call__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        sampling: Sampling,
        stops: list[int],
    ) -> Generated:
        """Respond to each prompt (see `Generator`)."""
        size, longest = prompt_ids.shape[1], sampling.max_new_tokens
        mask = (torch.arange(size, device=prompt_ids.device) >= size - prompt_lengths[:, None]).long()
        strings = StopStringCriteria(tokenizer, sampling.stop_strings) if sampling.stop_strings else None
        going = torch.arange(len(prompt_ids) * sampling.num_responses, device=prompt_ids.device)
        prompt = going // sampling.num_responses
        ids = prompt_ids[prompt]
        responses = ids.new_zeros(len(ids), longest)
        own = torch.zeros(2, len(ids), longest, device=ids.device) if _is_exact(lm) else None
        ends = torch.full_like(going, _NEVER)
        done = 0
        together = is_sharded(lm)
        drop_every = None if together else self.drop_every
        with _settings_put_aside(lm):
            once = sampling.num_responses > 1 and not together
            cache = _read_once(lm, prompt_ids, mask, prompt) if once else None
            mask = mask[prompt]
            while done < longest and len(going):
                search = _StopSearch(size, ids, stops, strings)
                until = min(done + (drop_every or longest), longest)
                found = None if own is None else own[:, going]
                drawing = _Draw(size, sampling.temperature, found)
                out = lm.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=_config(sampling, stops, done, until),
                    logits_processor=LogitsProcessorList([drawing]),
                    stopping_criteria=StoppingCriteriaList([search]),
                    synced_gpus=together,
                    **({} if cache is None else {"past_key_values": cache}),
                )
                if bool(drawing.broken):
                    raise ValueError(f"{lm.config.name_or_path}: expected logits that are numbers, got NaN in sampling")
                ids = out.sequences
                if own is not None and found is not None:
                    own[:, going] = found
                mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
                done = ids.shape[1] - size
                responses[going, :done] = ids[:, size:]
                ends[going] = search.ends
                stay = (search.ends > done).nonzero()[:, 0]
                going, ids, mask, cache = going[stay], ids[stay], mask[stay], _select(lm, out.past_key_values, stay)
                if together:
                    break
        known = None if own is None else TokenLogprobs(*own[:, :, :done])
        return Generated(responses[:, :done], ends.clamp_max(done), ends <= done, own=known)


class _Draw(LogitsProcessor):
    """Draws the next token of each row, and leaves `generate` no other; its own draws cost more.

    Args:
        prompt_size: Tokens before a response.
        temperature: The logits are divided by it.
        found: Log-probabilities and entropies of the drawn tokens (2, B, T) to fill in, or `None` to write nothing
            down.

    Attributes:
        broken: Whether a logit was NaN, or all of a row minus infinity; one bool on the device, so that nobody waits.
    """

    def __init__(self, prompt_size: int, temperature: float, found: Tensor | None) -> None:
        self.prompt_size = prompt_size
        self.temperature = temperature
        self.found = found
        self.broken = torch.tensor(False)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits that only the drawn tokens have (B, V)."""
        tokens, logprobs, probabilities = drawn(scores, self.temperature)
        own = logprobs.gather(1, tokens[:, None])[:, 0]
        place = input_ids.shape[1] - self.prompt_size
        self.broken = self.broken.to(own.device) | own.isnan().any()
        # Where `generate` finds the end of all rows a step late, it takes the last token back.
        if self.found is not None and place < self.found.shape[2]:
            # What could not be drawn counts 0, and not 0 times infinity.
            terms = probabilities * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)
            self.found[:, :, place] = torch.stack([own, -terms.sum(dim=-1)])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def drawn(scores: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """A token for each row of logits (B, V), and log-probabilities and probabilities (B, V) it was drawn with."""
    logprobs = (scores / temperature).log_softmax(dim=-1)
    probabilities = logprobs.exp()
    return draw(probabilities), logprobs, probabilities


class _StopSearch(StoppingCriteria):
    """Looks for stop tokens and stop strings in the responses alone, and remembers where each row's first one ended.

    Attributes:
        ends: Tokens of each response up to its end, `_NEVER` where it goes on.
    """

    def __init__(self, prompt_size: int, rows: Tensor, stops: list[int], strings: StopStringCriteria | None) -> None:
        self.prompt_size = prompt_size
        self.stops = torch.tensor(stops, device=rows.device, dtype=rows.dtype)
        self.strings = strings
        self.ends = rows.new_full((len(rows),), _NEVER)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row has ended."""
        responses = input_ids[:, self.prompt_size :]
        found = torch.isin(responses[:, -1], self.stops)
        if self.strings is not None:
            found = found | self.strings(responses, scores)
        self.ends = torch.where(found, self.ends.clamp_max(responses.shape[1]), self.ends)
        return self.ends < _NEVER


def _config(sampling: Sampling, stops: list[int], done: int, until: int) -> GenerationConfig:
    """How to go on from `done` tokens of the responses to `until`."""
    return generation_config(
        sampling,
        stops,
        # `_Draw` draws, and divides by the temperature.
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        max_new_tokens=until - done,
        min_new_tokens=max(0, min(sampling.min_new_tokens, until) - done) or None,
        stop_strings=None,  # `_StopSearch` looks for them in the responses alone
        use_cache=True,
        return_dict_in_generate=True,
    )


def _is_exact(lm: PreTrainedModel) -> bool:
    """Whether all of a model computes in float32, so that a token has one probability whoever computes it."""
    return (
        all(p.dtype == torch.float32 for p in lm.parameters())
        and not torch.is_autocast_enabled(lm.device.type)
        and torch.get_float32_matmul_precision() == "highest"
        and not is_sharded(lm)
    )


@contextmanager
def _settings_put_aside(lm: PreTrainedModel) -> Iterator[None]:
    # transformers fills what a configuration leaves open from the model's own settings, which may shape the
    # distribution (min-p, suppressed tokens, a minimum length, …).
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own


def _read_once(lm: PreTrainedModel, ids: Tensor, mask: Tensor, prompt: Tensor) -> Cache | None:
    """Keys and values of all but the last token of each prompt, for the rows that answer it; `None` for nothing."""
    if ids.shape[1] == 1:
        return None
    config = GenerationConfig(do_sample=False, max_new_tokens=1, pad_token_id=0, return_dict_in_generate=True)
    out = lm.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], generation_config=config)
    return _select(lm, out.past_key_values, prompt)


def _select(lm: PreTrainedModel, cache: Any, rows: Tensor) -> Cache | None:
    """The cache of these rows, or `None` (everything is read again) where a model keeps another kind of state."""
    if not isinstance(cache, Cache) or "past_key_values" not in inspect.signature(lm.forward).parameters:
        return None
    # Unlike `batch_select_indices`, this reaches recurrent states too.
    cache.reorder_cache(rows)
    return cache
