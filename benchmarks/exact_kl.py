"""What the exact KL of each token's distribution costs: time of a scoring phase with it and without.

A random Llama of SmolLM2-135M's shape with adapters scores random rows: the reference's pass, the policy's, and the
critic's on the reference's states. Both are timed alternately and in one run, and the ratio is taken pair by pair.

    python benchmarks/exact_kl.py
    python benchmarks/exact_kl.py --rows 64 --device cuda
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from jsonargparse import auto_cli
from transformers import LlamaConfig, LlamaForCausalLM

from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.models.shaping import Shaping
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.weights import quiet


def seconds(score: Callable[[], object], device: str) -> float:
    """Time of a call."""
    started = time.perf_counter() if device != "cpu" else time.process_time()
    score()
    if device == "cpu":
        return time.process_time() - started
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main(
    hidden_size: int = 576,
    intermediate_size: int = 1536,
    layers: int = 30,
    heads: int = 9,
    key_value_heads: int = 3,
    vocabulary: int = 49152,
    rows: int = 4,
    prompt_length: int = 64,
    response_length: int = 64,
    repetitions: int = 5,
    threads: int = 1,
    device: str = "cpu",
) -> None:
    """Print the ratio of times.

    Args:
        hidden_size: Width of the model.
        intermediate_size: Width inside its blocks.
        layers: Its blocks.
        heads: Its attention heads.
        key_value_heads: Of these, those with keys and values of their own.
        vocabulary: Its tokens.
        rows: Responses that are scored.
        prompt_length: Tokens of a prompt.
        response_length: Tokens of a response.
        repetitions: Pairs of timings; the median of their ratios is the result.
        threads: Threads of torch.
        device: Where to.
    """
    quiet()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        max_position_embeddings=prompt_length + response_length,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        networks = ActorCritic(Pretrained(folder), Lora(), CriticSpec()).to(device)
    ids = torch.randint(vocabulary, (rows, prompt_length + response_length), device=device)
    mask = torch.ones(rows, response_length, dtype=torch.bool, device=device)
    batch = TokenRows(ids, torch.full((rows,), prompt_length, device=device), mask)

    @torch.no_grad()
    def sampled() -> None:
        reference = networks.reference(batch, Shaping())
        networks.actor(batch, Shaping())
        networks.values(batch, reference.value_states)

    @torch.no_grad()
    def exact() -> None:
        reference = networks.reference(batch, Shaping(), keep_states=True)
        assert reference.states is not None
        networks.actor_with_kl(batch, Shaping(), reference.states)
        networks.values(batch, reference.value_states)

    sampled(), exact()
    pairs = []
    for i in range(repetitions):
        order = (sampled, exact) if i % 2 else (exact, sampled)
        times = {score: seconds(score, device) for score in order}
        pairs.append((times[exact], times[sampled]))
    ratios = [one / other for one, other in pairs]
    with_it, without = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{rows} rows of {prompt_length} + {response_length} tokens: {with_it:.3g} s with exact KLs, {without:.3g} s "
        f"without, median ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
