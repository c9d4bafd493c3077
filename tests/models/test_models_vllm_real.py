"""The vLLM generator against vLLM itself, on the tiny model: `LIT_VAPO_VLLM=<its Python> pytest -m vllm`."""

import os

import helpers
import ppo_helpers
import pytest
import torch

from lit_vapo.models.generation import Sampling
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Lora, Pretrained, load_tokenizer
from lit_vapo.models.vllm_generator import VllmGenerator
from lit_vapo.rollout.rollout import assemble_rows

PYTHON = os.environ.get("LIT_VAPO_VLLM")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="LIT_VAPO_VLLM names no interpreter of an environment with vLLM"),
]
# For a CPU build on a machine that others use; they do nothing on a GPU.
ENVIRONMENT = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
OPTIONS = ["--gpu-memory-utilization", "0.3", "--enforce-eager"]


def moved(policy, seed):
    random = torch.Generator().manual_seed(seed)
    for name, parameter in policy.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=random)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose heads are as wide as vLLM wants them."""
    path = tmp_path_factory.mktemp("vllm_model") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return helpers.tiny_model(path, helpers.tiny_tokenizer(path), **sizes)


@pytest.fixture(scope="module")
def opened(model, tmp_path_factory):
    """A policy, and a generator that is open for it."""
    environment = {} if torch.cuda.is_available() else ENVIRONMENT
    policy = Policy(Pretrained(model), Lora(4, 16.0))
    moved(policy, 1)
    generator = VllmGenerator(python=PYTHON, options=OPTIONS, environment=environment, start_seconds=900.0)
    folder, tokenizer = tmp_path_factory.mktemp("vllm"), load_tokenizer(Pretrained(model))
    generator.open(policy, tokenizer, Sampling(), longest=64, folder=folder, version=0)
    yield policy, tokenizer, generator
    generator.close()


@torch.no_grad()
def gap(opened, model, sampling, role="actor", version=0, stops=()):
    """Largest difference of a token's log-probability between vLLM and the policy, and the responses."""
    policy, tokenizer, generator = opened
    batch = ppo_helpers.prompt_batch(model)
    generator.sync(policy, role, version)
    with policy.acting_as(role) as lm:
        out = generator(lm, tokenizer, batch.input_ids, batch.lengths, sampling, list(stops))
    rows = assemble_rows(batch, out)
    hidden = policy.hidden(role, rows.input_ids, rows.lengths).last
    about = (rows.input_ids, rows.prompt_lengths, rows.response_mask, sampling.shaping(list(stops)))
    learner = policy.logprobs(role, hidden, *about).logprobs
    return float((learner - out.logprobs)[rows.response_mask].abs().max()), out


@pytest.mark.parametrize("role", ["actor", "reference"])
def test_each_role_is_sampled_from_its_own_weights(opened, model, role):
    difference, out = gap(opened, model, Sampling(12, 0.7, num_responses=3), role, stops=range(60))
    assert difference < 1e-3
    assert out.weights_version == (0 if role == "actor" else None)
    last = out.response_ids[torch.arange(18), out.response_lengths - 1]
    assert torch.equal(out.stopped, last < 60)
    assert len({tuple(r) for r in out.response_ids.tolist()}) > 15


def test_new_adapters_are_sampled_from_at_once(opened, model):
    moved(opened[0], 2)
    assert gap(opened, model, Sampling(12, 0.7), version=0)[0] > 0.05, "the server has the old ones"
    difference, out = gap(opened, model, Sampling(12, 0.7), version=1)
    assert difference < 1e-3
    assert out.weights_version == 1


def test_a_minimum_length_holds_stop_tokens_back_in_sampling_and_figures(opened, model):
    sampling = Sampling(8, 0.7, num_responses=4, min_new_tokens=3)
    difference, out = gap(opened, model, sampling, version=1, stops=range(160))
    assert difference < 1e-3
    assert out.response_lengths.min() == 4


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(opened, model):
    sampling = Sampling(12, 0.7, num_responses=4, stop_strings=["e", "ou"])
    difference, out = gap(opened, model, sampling, version=1)
    assert difference < 1e-3
    for ids, length, stopped in zip(out.response_ids.tolist(), out.response_lengths, out.stopped, strict=True):
        found = [any(s in opened[1].decode(ids[: t + 1]) for s in ("e", "ou")) for t in range(length)]
        assert found == [False] * (int(length) - 1) + [bool(stopped)]
