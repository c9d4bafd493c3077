"""Passes on tensors without data, beside arithmetic by hand and beside the same passes with data."""

from dataclasses import replace

import pytest
import torch
from plan_helpers import config_only
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from lit_vapo.models.actor_critic import ActorCritic
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Shaping
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.weightless import weightless
from lit_vapo.plan.draft import Setup, planned
from lit_vapo.plan.dry_run import DryRun, held_bytes, parameter_bytes
from lit_vapo.plan.ppo import PPOJob, draft_ppo

ROWS, PROMPT, NEW = 4, 24, 8


def networks_of(path, lora=True, critic=None, **spec):
    with weightless():
        return ActorCritic(Pretrained(path, **spec), Lora(rank=4) if lora else None, critic)


def dry(networks, mixed=None, on_cpu=True):
    return DryRun(networks, 500, mixed, on_cpu)


def job_of(path, **changed):
    job = PPOJob(
        base=Pretrained(path),
        lora=Lora(rank=4),
        critic=CriticSpec(),
        reward=None,
        policy=None,
        prompts=8,
        responses=1,
        prompt_length=PROMPT,
        new=NEW,
        epochs=1,
        minibatches=2,
        micro_batch_tokens=64,
    )
    return replace(job, **changed)


def test_weights_are_those_of_the_configuration(bare_model):
    # Embeddings and head 2·500·64; a block: attention 64·64·2 + 64·32·2, MLP 3·64·192, norms 2·64; five, and a norm.
    count = 2 * 500 * 64 + 5 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192 + 2 * 64) + 64
    # Both have the frequencies of rotary embeddings, 8 numbers, twice in float32.
    assert held_bytes(dry_lm(bare_model, dtype="float32")) == 4 * count + 64
    assert held_bytes(dry_lm(bare_model, dtype="bfloat16")) == 2 * count + 64


def dry_lm(path, **spec):
    networks = networks_of(path, lora=False, **spec) if spec.get("dtype") == "float32" else networks_of(path, **spec)
    dry(networks)
    model = networks.policy.causal_lm
    # Adapters aside.
    return nn.ModuleList([m for n, m in model.named_modules() if not list(m.children()) and "lora_" not in n])


@pytest.mark.parametrize(
    ("quantization", "a_weight", "a_row", "a_block"), [("8bit", 1, 4, 0), ("4bit", 0.5, 0, 4 / 64)]
)
def test_quantised_weights_come_with_their_scales(bare_model, quantization, a_weight, a_row, a_block):
    linear = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192
    rows = 64 + 32 + 32 + 64 + 192 + 192 + 64
    blocks = 5 * (linear * (a_weight + a_block) + rows * a_row)
    # Embeddings, head and norms stay in bfloat16.
    rest = 2 * (2 * 500 * 64 + 5 * 2 * 64 + 64) + 64
    assert held_bytes(dry_lm(bare_model, dtype="bfloat16", quantization=quantization)) == blocks + rest


def cache_bytes(layers: int, rows: int, tokens: int, width: int, item: int) -> float:
    """Keys and values that generation keeps: 2 · layers · rows · tokens · width · item.

    Args:
        layers: Blocks that keep them.
        rows: Responses drawn at once.
        tokens: Tokens of the prompt and of the response.
        width: Heads of keys times their size.
        item: Bytes a number.

    Example:
        >>> cache_bytes(layers=28, rows=64, tokens=512, width=512, item=2)  # 2·28·64·512·512·2
        1879048192.0
    """
    return 2.0 * layers * rows * tokens * width * item


def test_the_cache_is_that_of_the_formula(bare_model):
    networks = networks_of(bare_model, dtype="bfloat16")
    _, drawing = dry(networks, torch.bfloat16).generate(networks.policy, 3, 2, PROMPT, NEW)
    assert drawing.parts["cache"] == cache_bytes(5, 6, PROMPT + NEW, 2 * 16, 2)


def test_windows_bound_the_cache(tmp_path):
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"num_hidden_layers": 2, "layer_types": kinds, "sliding_window": 8}
    path = config_only(tmp_path / "gemma", "gemma3_text", **sizes)
    networks = networks_of(path)
    _, drawing = dry(networks).generate(networks.policy, 3, 1, PROMPT, NEW)
    # A window of 8 tokens, with the one at work.
    whole, window = (cache_bytes(1, 3, tokens, 2 * 16, 4) for tokens in (PROMPT + NEW, 8))
    assert drawing.parts["cache"] == whole + window


def test_activations_are_those_that_were_measured_before(tmp_path):
    # LoRA on all linears under autocast, per token and block: 24.6·H + 8.2·I + 4.4·kv bytes, from an earlier
    # measurement of a Qwen2 with data. Wide enough that ranks, heads and masks do not matter.
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 128}
    kept = []
    for blocks in (2, 3):
        path = config_only(tmp_path / str(blocks), "qwen2", num_hidden_layers=blocks, **sizes)
        networks = networks_of(path, dtype="bfloat16")
        kept.append(dry(networks, torch.bfloat16).learn(networks, 2, 192, 64).parts["activations"])
    expected = 2 * 256 * (24.6 * 1024 + 8.2 * 4096 + 4.4 * 256)
    assert kept[1] - kept[0] == pytest.approx(expected, rel=0.05)


def test_checkpointing_keeps_the_inputs_of_blocks(bare_model):
    kept = {}
    for saving in (False, True):
        networks = networks_of(bare_model, gradient_checkpointing=saving)
        kept[saving] = dry(networks).learn(networks, ROWS, PROMPT, NEW)
    assert kept[True].parts["activations"] < 0.4 * kept[False].parts["activations"]
    assert kept[True].flops > kept[False].flops


def rows_with_data():
    ids = torch.randint(0, 500, (ROWS, PROMPT + NEW))
    mask = torch.ones(ROWS, NEW, dtype=torch.bool)
    # Without any padding transformers leaves masks out, and takes less.
    mask[0, -1] = False
    return TokenRows(ids, torch.full((ROWS,), PROMPT), mask)


def profiled_peak(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    total, peak = 0, 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        total += size
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize(
    ("lora", "saving", "mixed"),
    [(True, False, None), (False, True, None), (True, True, torch.bfloat16), (False, False, torch.bfloat16)],
)
def test_a_pass_with_data_takes_as_much(tmp_path, lora, saving, mixed):
    path = config_only(tmp_path / "m", num_hidden_layers=2)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(path)
    spec = Pretrained(path, dtype="float32", gradient_checkpointing=saving)
    networks = ActorCritic(spec, Lora(rank=4) if lora else None, CriticSpec("own"))
    rows, trained = rows_with_data(), [*networks.actor_parameters(), *networks.critic_parameters()]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)

    def learn():
        # As Lightning has it, without a cache.
        with torch.autocast("cpu", torch.bfloat16, mixed is not None, cache_enabled=False):
            loss = networks.actor(rows, Shaping()).logprobs.sum() + networks.values(rows, None).sum()
            loss.backward()

    learn()  # what is made once is made
    measured = profiled_peak(learn)
    bare = networks_of(path, lora, CriticSpec("own"), dtype="float32", gradient_checkpointing=saving)
    found = dry(bare, mixed).learn(bare, ROWS, PROMPT, NEW)
    made = found.peak - found.parts["gradients"]
    assert made == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_blocks_below_the_adapters_are_computed_once(tmp_path, kind):
    # Falcon's blocks answer with tuples.
    path = config_only(tmp_path / "model")
    if kind == "falcon":
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 5, "vocab_size": 500}
        AutoConfig.for_model("falcon", **sizes).save_pretrained(path)
    setup, found = Setup(on_cpu=True), {}
    for top in (None, 1):
        score, update = draft_ppo(job_of(path, lora=Lora(rank=4, top_layers=top), critic=None), setup).phases[1:]
        found[top] = score.flops, update.flops, score.moments[0].parts["workspace"]
    # Four of five blocks: the reference computes them, the policy does not. Without, there were five forth and back.
    assert found[1][0] < 0.7 * found[None][0]
    assert found[1][1] < 0.45 * found[None][1]
    # What is kept of 8 rows, while it is put in order.
    assert found[1][2] - found[None][2] == 3 * 4 * 8 * (PROMPT + NEW) * 64


FULL = {"lora": None, "prompt_length": 30, "new": 2, "minibatches": 1, "micro_batch_tokens": 128}


@pytest.mark.parametrize(("changed", "words"), [({"critic": None}, 500), (FULL, 5_000)])
def test_few_blocks_stretch_to_all(tmp_path, changed, words, monkeypatch):
    # With many words the gradients of embeddings are the peak of few blocks, and activations that of all.
    path = config_only(tmp_path / "model", vocab_size=words, tie_word_embeddings=True)
    job, setup = job_of(path, **changed), Setup(precision="bf16-mixed")
    short = planned(draft_ppo(job, setup), setup)
    monkeypatch.setattr("lit_vapo.plan.ppo.stretched", lambda base, uniform, draft: draft(0))
    whole = planned(draft_ppo(job, setup), setup)
    for name, parts in whole.phases.items():
        assert short.phases[name] == pytest.approx(parts, rel=1e-4)
    assert short.draft.phases[2].flops == pytest.approx(whole.draft.phases[2].flops, rel=1e-6)


def test_an_average_is_held_beside_what_trains(bare_model):
    setup = Setup(on_cpu=True)
    plain, averaged = (draft_ppo(job_of(bare_model, averaged=x), setup) for x in (False, True))
    # The critic, a number for each of 64 features and one more, is not averaged.
    adapters = plain.trained - 4 * 65
    assert averaged.weights - plain.weights == averaged.whole - plain.whole == adapters
    full, averaged = (draft_ppo(job_of(bare_model, lora=None, averaged=x), setup) for x in (False, True))
    assert averaged.cut - full.cut == parameter_bytes(networks_of(bare_model, lora=False).actor_parameters())


def test_products_on_a_gpu_have_room_to_work_in(bare_model):
    draft = draft_ppo(job_of(bare_model), Setup(on_cpu=True))
    cpu, gpu = (planned(draft, Setup(on_cpu=x)).phases for x in (True, False))
    # cuBLAS: 32 MiB for each of two threads.
    assert {name: gpu[name]["workspace"] - cpu[name]["workspace"] for name in cpu} == dict.fromkeys(cpu, 64 * 2.0**20)
