"""Rollouts by vLLM, by `generate` of transformers as it comes, and by ours: tokens a second, alternating.

    python benchmarks/vllm_rollout.py --model MODEL --python VLLM_ENVIRONMENT/bin/python

One server is started for all rounds. Each round draws the same prompts with all of them, in turn first and last. A few
tokens by each come before and are not counted (the server compiles then). The policy has LoRA adapters that do
something. Tokens are those of the responses, which all have the full length, since nothing stops them. Ours also looks
for ends, and leaves the log-probabilities and entropies of its tokens behind, as vLLM does; `generate` leaves nothing.

It also says how far vLLM's log-probabilities are from those of a pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_vapo.functional import sampler_gap
from lit_vapo.models.generation import Generated, Generator, Sampling
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Lora, Pretrained, load_tokenizer
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.models.trunk import length_mask
from lit_vapo.models.vllm_generator import VllmGenerator

PROMPT = "The film was long, and the people who saw it said that"


class Plain(Generator):
    """`generate` of transformers, as it comes."""

    def __call__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        sampling: Sampling,
        stops: list[int],
    ) -> Generated:
        """Respond to each prompt, of which all have one length."""
        count = sampling.max_new_tokens
        # Nothing of the model's own settings.
        shape = {"do_sample": True, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        shape["temperature"] = sampling.temperature
        length = {"max_new_tokens": count, "min_new_tokens": count}
        out = lm.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), pad_token_id=0, **shape, **length)
        full = torch.full_like(prompt_lengths, count)
        return Generated(out[:, prompt_ids.shape[1] :], full, torch.zeros_like(full, dtype=torch.bool))


def main() -> None:
    """Time rounds and print what came of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--options", default="", help="further options of the server")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--environment", nargs="*", default=[], help="NAME=VALUE for the server")
    args = parser.parse_args()
    torch.manual_seed(0)
    base = Pretrained(args.model, args.dtype)
    policy, tokenizer = Policy(base, Lora(8, 16.0)), load_tokenizer(base)
    for name, parameter in policy.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    words = tokenizer(PROMPT)["input_ids"]
    ids = torch.tensor([[*words, tokenizer(f" {i}")["input_ids"][-1]] for i in range(args.prompts)])
    lengths = torch.full((args.prompts,), ids.shape[1])
    sampling = Sampling(args.tokens, args.temperature)
    given = dict(x.split("=", 1) for x in args.environment)
    vllm = VllmGenerator(python=args.python, options=args.options.split(), environment=given)
    generators: dict[str, Generator] = {"generate": Plain(), "ours": TransformersGenerator(), "vllm": vllm}

    def draw(name: str, sampling: Sampling = sampling) -> tuple[float, Generated]:
        with policy.acting_as("actor") as lm:
            started = time.perf_counter()
            out = generators[name](lm, tokenizer, ids, lengths, sampling, [])
        return int(out.response_lengths.sum()) / (time.perf_counter() - started), out

    with tempfile.TemporaryDirectory() as folder:
        longest = ids.shape[1] + args.tokens
        vllm.open(policy, tokenizer, sampling, longest=longest, folder=Path(folder), version=0)
        rates: dict[str, list[float]] = {name: [] for name in generators}
        loads = []
        for name in generators:
            draw(name, replace(sampling, max_new_tokens=min(8, args.tokens)))
        for number in range(args.rounds):
            order = list(generators) if number % 2 == 0 else list(generators)[::-1]
            loads.append(os.getloadavg()[0])
            for name in order:
                rate, out = draw(name)
                rates[name].append(rate)
                if name == "vllm":
                    last = out
        vllm.close()
    assert last.logprobs is not None
    learner = learner_logprobs(policy, ids, last, sampling)
    mask = length_mask(last.response_lengths, last.logprobs.shape[1])
    gap = sampler_gap(learner, last.logprobs, mask)
    ratios = {
        f"{one} / {other}": [a / b for a, b in zip(rates[one], rates[other], strict=True)]
        for one, other in (("ours", "generate"), ("vllm", "generate"), ("ours", "vllm"))
    }
    found = {
        "prompts": args.prompts,
        "tokens": args.tokens,
        "dtype": str(policy.causal_lm.dtype),
        "tokens_per_second": rates,
        "ratios": ratios,
        "median_ratios": {name: statistics.median(each) for name, each in ratios.items()},
        "load_before_each_round": loads,
        "largest_logprob_difference": float((learner - last.logprobs)[mask].abs().max()),
        "sampler_kl": float(gap.kl),
        "sampler_ratio_max": float(gap.ratio_max),
    }
    print(json.dumps(found, indent=2))


@torch.no_grad()
def learner_logprobs(policy: Policy, ids: torch.Tensor, out: Generated, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities of the same tokens by the policy itself, eight rows at a time."""
    parts = []
    for rows in torch.arange(len(ids)).split(8):
        size = out.response_ids.shape[1]
        joined = torch.cat([ids[rows], out.response_ids[rows]], 1)
        prompts = torch.full((len(rows),), ids.shape[1])
        part = TokenRows(joined, prompts, length_mask(out.response_lengths[rows], size))
        hidden = policy.hidden("actor", part.input_ids, part.lengths).last
        about = (part.input_ids, part.prompt_lengths, part.response_mask, sampling.shaping([]))
        parts.append(policy.logprobs("actor", hidden, *about).logprobs)
    return torch.cat(parts)


if __name__ == "__main__":
    main()
