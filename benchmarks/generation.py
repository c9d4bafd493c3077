"""What sampling gains when rows that have ended leave the batch, and when a prompt is read once for all its responses.

A random Llama answers random prompts; a share of the vocabulary stops, so lengths vary as in a real rollout. Each pair
is timed alternately and in one run, and the ratio is taken pair by pair, so a machine whose speed drifts favours
neither.

    python benchmarks/generation.py
    python benchmarks/generation.py --hidden_size 1024 --layers 12 --prompts 64 --max_new_tokens 256 --device cuda
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from jsonargparse import auto_cli
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lit_vapo.models.generation import Generated, Sampling
from lit_vapo.models.transformers_generator import TransformersGenerator


def speed(generate: Callable[[], Generated], seed: int) -> float:
    """Response tokens per second."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    tokens = int(generate().response_lengths.sum())
    return tokens / (time.perf_counter() - started)


def compare(name: str, new: Callable[[], Generated], old: Callable[[], Generated], repetitions: int) -> None:
    """Print the median ratio of two speeds, measured in turns."""
    speed(new, 0), speed(old, 0)
    ratios, speeds = [], []
    for i in range(repetitions):
        pair = {}
        for side in ("new", "old") if i % 2 else ("old", "new"):
            pair[side] = speed(new if side == "new" else old, i)
        ratios.append(pair["new"] / pair["old"])
        speeds.append((pair["new"], pair["old"]))
    faster, slower = (statistics.median(column) for column in zip(*speeds, strict=True))
    print(
        f"{name}: {faster:.0f} against {slower:.0f} tokens/s, median ratio {statistics.median(ratios):.2f} "
        f"(from {min(ratios):.2f} to {max(ratios):.2f}, {repetitions} alternating pairs)"
    )


def main(
    hidden_size: int = 128,
    layers: int = 4,
    vocabulary: int = 2048,
    prompts: int = 32,
    prompt_length: int = 32,
    max_new_tokens: int = 96,
    stop_share: float = 0.03,
    num_responses: int = 8,
    long_prompt_length: int = 192,
    drop_every: int = 16,
    repetitions: int = 5,
    threads: int = 1,
    device: str = "cpu",
) -> None:
    """Print the ratios of speeds.

    Args:
        hidden_size: Width of the model.
        layers: Its blocks.
        vocabulary: Its tokens.
        prompts: Responses in the batch.
        prompt_length: Tokens of a prompt.
        max_new_tokens: Longest response.
        stop_share: Share of the vocabulary that ends a response.
        num_responses: Responses to each prompt where it is read once.
        long_prompt_length: Tokens of a prompt there.
        drop_every: Tokens between two looks at which responses have ended.
        repetitions: Pairs of timings; the median of their ratios is the result.
        threads: Threads of torch.
        device: Where to.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=vocabulary,
        max_position_embeddings=prompt_length + long_prompt_length + max_new_tokens,
    )
    lm = LlamaForCausalLM(config).to(device).eval()
    stops = list(range(round(stop_share * vocabulary)))
    dropping, keeping = TransformersGenerator(drop_every), TransformersGenerator(None)

    def random_prompts(count: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.randint(vocabulary, (count, length), device=device), torch.full((count,), length, device=device)

    def answer(generator: TransformersGenerator, ids: tuple[Tensor, Tensor], responses: int) -> Generated:
        return generator(lm, None, *ids, Sampling(max_new_tokens, num_responses=responses), stops)  # type: ignore[arg-type]

    batch = random_prompts(prompts, prompt_length)
    mean = float(answer(dropping, batch, 1).response_lengths.float().mean())
    print(f"{prompts} responses of {mean:.0f} tokens on average, at most {max_new_tokens}")
    compare(
        "rows that ended leave, against all stay",
        lambda: answer(dropping, batch, 1),
        lambda: answer(keeping, batch, 1),
        repetitions,
    )
    few = random_prompts(max(1, prompts // num_responses), long_prompt_length)
    many = few[0].repeat_interleave(num_responses, 0), few[1].repeat_interleave(num_responses, 0)
    compare(
        f"prompts of {long_prompt_length} tokens read once, against {num_responses} times",
        lambda: answer(dropping, few, num_responses),
        lambda: answer(dropping, many, 1),
        repetitions,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
