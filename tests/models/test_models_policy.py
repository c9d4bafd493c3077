"""Models of several architectures: log-probabilities, pooling, taps, adapters, quantised bases, sampling."""

import helpers
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_vapo.models.generation import Sampling, Shaping
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import (
    Lora,
    Pretrained,
    disable_dropout,
    hidden_size,
    load_backbone,
    load_causal_lm,
)
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.models.trunk import length_mask, pool, response_states, run_trunk

SMALL_HEAD = {"head_dim": 16}
KINDS = {
    "llama": {},
    "gpt2": {},
    # Four-bit weights come in blocks of 64.
    "wide": {"hidden_size": 64, "intermediate_size": 128},
    "qwen2": {},
    "qwen3": SMALL_HEAD,
    "mistral": {"sliding_window": 4},
    "gemma": SMALL_HEAD,
    # Every second layer of gemma2 looks back 4 tokens only.
    "gemma2": {**SMALL_HEAD, "sliding_window": 4, "query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0},
    "gemma3_text": {**SMALL_HEAD, "sliding_window": 4, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
}
PROMPT_LENGTHS, LENGTHS = torch.tensor([2, 5, 1]), torch.tensor([6, 9, 4])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each architecture; the first has no pad token, so that padding is the end of sequence."""
    made = {}

    def get(kind, layers=2):
        if (kind, layers) not in made:
            path = tmp_path_factory.mktemp("kinds") / f"{kind}{layers}"
            tokenizer = helpers.tiny_tokenizer(path, pad=kind != "llama")
            made[kind, layers] = helpers.tiny_model(
                path, tokenizer, "llama" if kind == "wide" else kind, layers, **KINDS[kind]
            )
        return made[kind, layers]

    return get


def rows(garbage):
    """Right-padded ids (3, 9): token 0 is the end of sequence, and `garbage` fills the padding."""
    ids = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 3] = 0
    return torch.where(length_mask(LENGTHS, 9), ids, torch.tensor(garbage))


@torch.no_grad()
def brute(lm, temperature):
    """Log-probabilities and entropies of the responses, each row alone and from the whole logits."""
    logprobs, entropies = torch.zeros(3, 4), torch.zeros(3, 4)
    for i, ids in enumerate(rows(0)):
        start, end = int(PROMPT_LENGTHS[i]), int(LENGTHS[i])
        out = (lm(input_ids=ids[None, :end]).logits[0].double() / temperature).log_softmax(-1)
        for t in range(end - start):
            step = out[start + t - 1]
            logprobs[i, t] = step[ids[start + t]]
            entropies[i, t] = -(step.exp() * step).sum()
    return logprobs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_the_whole_logits(folders, kind, temperature):
    policy = Policy(Pretrained(folders(kind)), Lora(4))
    mask = length_mask(LENGTHS - PROMPT_LENGTHS, 4)
    with torch.no_grad():
        hidden = policy.hidden("actor", rows(299), LENGTHS).last
        out = policy.logprobs("actor", hidden, rows(299), PROMPT_LENGTHS, mask, Shaping(temperature))
    logprobs, entropies = brute(AutoModelForCausalLM.from_pretrained(folders(kind)), temperature)
    torch.testing.assert_close(out.logprobs, logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropy, entropies, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(folders, kind):
    backbone = load_backbone(Pretrained(folders(kind)))
    mask = length_mask(LENGTHS, 9)[..., None]
    with torch.no_grad():
        one, two = (run_trunk(backbone, rows(g), LENGTHS).last for g in (0, 299))
    zero = torch.zeros(())
    torch.testing.assert_close(torch.where(mask, one, zero), torch.where(mask, two, zero), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tapped_block_is_a_truncated_backbone(folders, kind, tmp_path):
    spec = Pretrained(folders(kind, 3))
    whole, short = load_backbone(spec), load_backbone(spec, 2)
    with torch.no_grad():
        out = run_trunk(whole, rows(0), LENGTHS, 2)
        expected = run_trunk(short, rows(0), LENGTHS).last
        last = run_trunk(whole, rows(0), LENGTHS, 3)
    # Padding may differ: only real positions count.
    real = length_mask(LENGTHS, 9)
    torch.testing.assert_close(out.tapped[real], expected[real], atol=1e-5, rtol=1e-5)
    assert (out.tapped - out.last)[real].abs().max() > 1e-2
    assert last.tapped is last.last
    # The truncated model is a whole one: it saves and loads.
    short.save_pretrained(tmp_path / "short")
    with torch.no_grad():
        again = run_trunk(load_backbone(Pretrained(str(tmp_path / "short"))), rows(0), LENGTHS).last
    torch.testing.assert_close(again[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 4])
def test_a_block_that_is_not_there_is_refused(folders, layer):
    backbone = load_backbone(Pretrained(folders("llama", 3)))
    with pytest.raises(ValueError, match=rf"layer: expected 1 … 3, got {layer}"):
        run_trunk(backbone, rows(0), LENGTHS, layer)
    with pytest.raises(ValueError, match=rf"layer: expected 1 … 3 for .*, got {layer}"):
        load_backbone(Pretrained(folders("llama", 3)), layer)


def test_pooling_against_a_loop():
    hidden = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))
    hidden[~length_mask(LENGTHS, 9)] = float("nan")
    last, mean = (pool(hidden, LENGTHS, PROMPT_LENGTHS, p) for p in ("last", "mean"))
    for i in range(3):
        torch.testing.assert_close(last[i], hidden[i, LENGTHS[i] - 1])
        torch.testing.assert_close(mean[i], hidden[i, PROMPT_LENGTHS[i] : LENGTHS[i]].mean(0))
    assert pool(hidden.bfloat16(), LENGTHS, PROMPT_LENGTHS, "mean").dtype == torch.float32


def test_response_states_against_a_loop():
    hidden = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))
    states = response_states(hidden, PROMPT_LENGTHS, 4)
    for i in range(3):
        for t in range(int(LENGTHS[i] - PROMPT_LENGTHS[i])):
            torch.testing.assert_close(states[i, t], hidden[i, PROMPT_LENGTHS[i] - 1 + t])


def score(policy, role):
    mask = length_mask(LENGTHS - PROMPT_LENGTHS, 4)
    hidden = policy.hidden(role, rows(0), LENGTHS).last
    return policy.logprobs(role, hidden, rows(0), PROMPT_LENGTHS, mask, Shaping()).logprobs


def step(policy, lr=0.1):
    """One step up the response's likelihood."""
    optimizer = torch.optim.SGD(policy.actor_parameters(), lr=lr)
    before = score(policy, "actor")
    (-before.sum()).backward()
    optimizer.step()
    return before.detach()


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_adapters_train_and_the_reference_stays(folders, quantization):
    policy = Policy(Pretrained(folders("wide"), quantization=quantization), Lora(4))
    with torch.no_grad():
        reference = score(policy, "reference")
    before = step(policy, lr=0.01)  # small enough that a step up the gradient goes up
    torch.testing.assert_close(before, reference, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(score(policy, "reference"), reference)
        assert score(policy, "actor").sum() > before.sum() + 1e-3
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    with policy.acting_as("actor") as lm:
        out = TransformersGenerator()(lm, None, rows(0)[:, :2], torch.tensor([2, 2, 2]), Sampling(3), [0])
    assert out.response_ids.shape[0] == 3


@pytest.mark.parametrize(("quantization", "limit"), [("8bit", 0.05), ("4bit", 0.5)])
def test_quantised_weights_are_near_the_real_ones(folders, quantization, limit):
    whole = load_backbone(Pretrained(folders("wide"), dtype="float32"))
    small = load_backbone(Pretrained(folders("wide"), quantization=quantization))
    real = length_mask(LENGTHS, 9)
    with torch.no_grad():
        expected = run_trunk(whole, rows(0), LENGTHS).last[real]
        error = run_trunk(small, rows(0), LENGTHS).last[real].float() - expected
    assert 0 < error.norm() / expected.norm() < limit


def test_a_critic_s_adapters_are_its_own(folders):
    policy = Policy(Pretrained(folders("llama")), Lora(4), critic_adapter=True)
    actor, critic = policy.actor_parameters(), policy.critic_parameters()
    assert len(actor) == len(critic) > 0
    assert not {id(p) for p in actor} & {id(p) for p in critic}
    step(policy)
    assert all(p.grad is None or not p.grad.any() for p in critic)
    hidden = [policy.hidden(role, rows(0), LENGTHS).last.detach() for role in ("critic", "reference", "actor")]
    torch.testing.assert_close(hidden[0], hidden[1])
    assert (hidden[2] - hidden[1]).abs().max() > 1e-4


def test_roles_give_gradients_back_even_after_an_error(folders):
    policy = Policy(Pretrained(folders("llama")), Lora(4), critic_adapter=True)
    for role in ("critic", "reference", "actor"):
        with pytest.raises(RuntimeError, match=r"inside"), policy.acting_as(role):
            raise RuntimeError("inside")
        assert all(p.requires_grad for p in (*policy.actor_parameters(), *policy.critic_parameters())), role


def test_top_layers_bear_the_adapters(folders):
    policy = Policy(Pretrained(folders("llama", 3)), Lora(4, top_layers=1))
    names = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert names
    assert all(".layers.2." in name for name in names)
    # The word all-linear means the same seven layers there.
    everywhere = Policy(Pretrained(folders("llama", 3)), Lora(4))
    assert len(everywhere.actor_parameters()) == 3 * len(names)
    with pytest.raises(ValueError, match=r"model.lora.top_layers: expected 1 … 3, got 4"):
        Policy(Pretrained(folders("llama", 3)), Lora(4, top_layers=4))


def test_gpt2_s_own_linear_layers_bear_adapters(folders):
    for top in (None, 1):
        policy = Policy(Pretrained(folders("gpt2")), Lora(4, top_layers=top))
        before = step(policy)
        with torch.no_grad():
            assert score(policy, "actor").sum() > before.sum()


def test_an_adapter_on_the_head_is_refused(folders):
    with pytest.raises(
        ValueError, match=r"model.lora.target_modules: expected layers inside the blocks, got .*lm_head"
    ):
        Policy(Pretrained(folders("llama")), Lora(4, target_modules=["q_proj", "lm_head"]))


def test_full_fine_tuning_keeps_a_frozen_copy(folders):
    policy = Policy(Pretrained(folders("llama")), None)
    before = step(policy, lr=0.01)
    with torch.no_grad():
        torch.testing.assert_close(score(policy, "reference"), before)
        assert (score(policy, "actor") - before).abs().max() > 1e-3


def test_a_quantised_base_without_adapters_is_a_reference_alone(folders):
    with pytest.raises(ValueError, match=r"model.lora: expected adapters for a 8bit base, which is frozen, got null"):
        Policy(Pretrained(folders("llama"), quantization="8bit"), None, keep_reference=False)
    with pytest.raises(ValueError, match=r"model.critic.trunk: expected `reference` or `own`"):
        Policy(Pretrained(folders("llama")), None, critic_adapter=True)


@pytest.mark.parametrize(("kind", "options"), [("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
                                               ("llama", {"attention_dropout": 0.5})])  # fmt: skip
def test_dropout_is_off_even_in_training_mode(tmp_path, kind, options):
    path = helpers.tiny_model(tmp_path, helpers.tiny_tokenizer(tmp_path), kind, **options)
    lm = load_causal_lm(Pretrained(path)).train()
    assert not torch.equal(lm(input_ids=rows(0)).logits, lm(input_ids=rows(0)).logits)
    disable_dropout(lm)
    torch.testing.assert_close(lm(input_ids=rows(0)).logits, lm(input_ids=rows(0)).logits, rtol=0, atol=0)


def test_a_folder_that_is_not_there_is_no_hub_name():
    for load in (load_causal_lm, load_backbone, hidden_size):
        with pytest.raises(ValueError, match=r"base.path: expected a folder with a transformers model"):
            load(Pretrained("./nowhere/model"))
