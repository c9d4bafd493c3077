"""Generators of tests that say with what log-probabilities they sample."""

from dataclasses import replace

import torch

from lit_vapo.models.generation import Generator
from lit_vapo.models.heads import head_logprobs
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.models.trunk import length_mask, response_states, run_trunk


class TruthfulGenerator(Generator):
    """Samples at a multiple of the temperature that it is told, and says its true log-probabilities.

    Args:
        factor: The multiple; 1 for what it is told.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self._version = None

    def sync(self, policy, role, version):
        self._version = version

    @torch.no_grad()
    def __call__(self, lm, tokenizer, prompt_ids, prompt_lengths, sampling, stops):
        sampling = replace(sampling, temperature=self.factor * sampling.temperature)
        out = TransformersGenerator()(lm, tokenizer, prompt_ids, prompt_lengths, sampling, stops)
        each = sampling.num_responses
        size, longest = prompt_ids.shape[1], out.response_ids.shape[1]
        prompts = prompt_lengths.repeat_interleave(each)
        joined = torch.cat([prompt_ids.repeat_interleave(each, 0), out.response_ids], 1)
        place = (torch.arange(size + longest) + (size - prompts)[:, None]) % (size + longest)
        hidden = run_trunk(lm.base_model, joined.gather(1, place), prompts + out.response_lengths).last
        mask = length_mask(out.response_lengths, longest)
        states = response_states(hidden, prompts, longest)
        said = head_logprobs(lm, states, out.response_ids, mask, sampling.shaping(stops)).logprobs
        return out._replace(logprobs=said, weights_version=self._version)
