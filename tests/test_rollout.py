"""Rollouts: sequences assembled, scored and summed up as a loop would."""

import math
import statistics
from types import SimpleNamespace

import helpers
import ppo_helpers
import pytest
import torch

from lit_vapo.data.collate import PromptBatch
from lit_vapo.metrics import rollout_statistics, sample_rows
from lit_vapo.models.generation import Generated, Sampling
from lit_vapo.models.pretrained import Pretrained, load_backbone, load_causal_lm, load_tokenizer
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.rollout import assemble_rows, sample_references
from lit_vapo.types import RewardEstimate, TextReward, TokenSequence


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("rollout") / "ensemble", tiny_model_dir)


@pytest.fixture(scope="module")
def nets(tiny_model_dir, reward):
    return ppo_helpers.moved_networks(tiny_model_dir, reward)


@pytest.fixture(scope="module")
def rollout(nets, tiny_model_dir):
    return ppo_helpers.make_rollout(nets, tiny_model_dir, objective=VarianceAware(), missing_eos_penalty=0.5)


class LengthJudge(TextReward):
    def __call__(self, prompts, responses):
        return torch.tensor([float(len(r)) for r in responses])


def test_rows_are_prompt_then_response_then_padding():
    # Prompts [1 2 3], [4]; responses [7 8], [9]; what stands after a response's end is never looked at.
    batch = PromptBatch(torch.tensor([[1, 2, 3], [0, 0, 4]]), torch.tensor([3, 1]), ["a", "b"], torch.arange(2))
    generated = Generated(torch.tensor([[7, 8, 50], [9, 60, 61]]), torch.tensor([2, 1]), torch.tensor([True, False]))
    rows = assemble_rows(batch, generated)
    assert rows.input_ids[0, :5].tolist() == [1, 2, 3, 7, 8]
    assert rows.input_ids[1, :2].tolist() == [4, 9]
    assert rows.response_mask.tolist() == [[True, True], [True, False]]
    assert rows.lengths.tolist() == [5, 2]
    part = rows.select(torch.tensor([1]))
    assert part.input_ids.tolist() == [[4, 9]]
    assert part.response_mask.tolist() == [[True]]


def test_rows_against_a_loop():
    g = torch.Generator().manual_seed(0)
    lengths, sizes = torch.randint(1, 6, (20,), generator=g), torch.randint(1, 5, (20,), generator=g)
    ids = torch.randint(0, 99, (20, 5), generator=g)
    responses = torch.randint(0, 99, (20, 4), generator=g)
    batch = PromptBatch(ids, lengths, [""] * 20, torch.arange(20))
    rows = assemble_rows(batch, Generated(responses, sizes, sizes < 4))
    for i in range(20):
        expected = ids[i, 5 - lengths[i] :].tolist() + responses[i, : sizes[i]].tolist()
        assert rows.input_ids[i, : rows.lengths[i]].tolist() == expected


def test_an_empty_response_is_refused_by_its_prompt():
    batch = PromptBatch(torch.tensor([[1], [2]]), torch.tensor([1, 1]), ["first", "second"], torch.arange(2))
    empty = Generated(torch.tensor([[3], [3]]), torch.tensor([1, 0]), torch.tensor([False, False]))
    with pytest.raises(ValueError, match=r"expected at least one token in each response, got none for prompt 'second'"):
        assemble_rows(batch, empty)


@pytest.mark.parametrize(("layer", "pooling"), [(None, "last"), (1, "last"), (1, "mean")])
def test_features_of_the_shared_base_are_those_of_a_model_of_its_own(tiny_model_dir, tmp_path, layer, pooling):
    reward = ppo_helpers.ensemble(tmp_path / "ensemble", tiny_model_dir, layer=layer, pooling=pooling)
    networks = ppo_helpers.networks(tiny_model_dir, reward)
    assert networks.scorer.taps
    made = ppo_helpers.make_rollout(networks, tiny_model_dir)
    own = RewardModel.from_pretrained(reward)
    assert own.backbone is not None
    expected = own(made.rows.input_ids, made.rows.lengths, made.rows.prompt_lengths)
    torch.testing.assert_close(made.estimate.members, expected.members, atol=1e-5, rtol=1e-5)


def other_ensemble(folder):
    """An ensemble on a model with another tokenizer: no merges, one more special token."""
    tokenizer = helpers.tiny_tokenizer(folder / "other", pad=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    other = helpers.tiny_model(folder / "other", tokenizer, kind="gpt2", seed=5)
    head = HeadEnsemble(3, moderated=False)
    head.build(32)
    RewardModel(FeatureSpec(Pretrained(other), pooling="mean"), head, None).save_pretrained(folder / "ensemble")
    return str(folder / "ensemble")


def test_another_tokenizer_reads_the_text_anew(tiny_model_dir, tmp_path):
    reward = other_ensemble(tmp_path)
    networks = ppo_helpers.networks(tiny_model_dir, reward)
    assert not networks.scorer.taps
    made = ppo_helpers.make_rollout(networks, tiny_model_dir)
    own = RewardModel.from_pretrained(reward)
    tokenizer = own.load_tokenizer()
    assert 0 < made.stopped.sum() < len(made.stopped)
    for i, (prompt, response) in enumerate(zip(made.prompts, made.responses, strict=True)):
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(response, add_special_tokens=False)["input_ids"]
        ids = head + tail + [tokenizer.eos_token_id] * bool(made.stopped[i])
        direct = own(torch.tensor([ids]), torch.tensor([len(ids)]), torch.tensor([len(head)]))
        torch.testing.assert_close(made.estimate.members[i], direct.members[0], atol=1e-5, rtol=1e-5)


def test_scoring_in_many_batches_equals_scoring_in_one(nets, tiny_model_dir, rollout):
    again = ppo_helpers.make_rollout(nets, tiny_model_dir, objective=VarianceAware(), tokens_per_batch=1)
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "value_states"):
        mask = rollout.response_mask if name != "value_states" else rollout.response_mask[..., None]
        one, many = getattr(rollout, name), getattr(again, name)
        zero = torch.zeros(())
        torch.testing.assert_close(
            torch.where(mask, many, zero), torch.where(mask, one, zero), atol=1e-5, rtol=1e-5, msg=name
        )
    torch.testing.assert_close(again.estimate.members, rollout.estimate.members, atol=1e-5, rtol=1e-5)


def test_a_score_does_not_depend_on_its_neighbours(nets, tiny_model_dir, rollout):
    scorer = ppo_helpers.maker(nets, tiny_model_dir)
    for i in range(len(rollout.prompts)):
        row = rollout.rows.select(torch.tensor([i]))
        scored = scorer._passes.score(row, "actor", nets.scorer.taps, values=True)
        size = row.response_mask.shape[1]
        torch.testing.assert_close(scored.logprobs[0], rollout.logprobs[i, :size], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scored.values[0], rollout.values[i, :size], atol=1e-5, rtol=1e-5)
        members = nets.scorer.model.head(*scored.pooled).members
        torch.testing.assert_close(members[0], rollout.estimate.members[i], atol=1e-5, rtol=1e-5)


def test_clip_comes_before_the_penalty_for_a_missing_stop(nets, tiny_model_dir, rollout):
    clipped = ppo_helpers.make_rollout(
        nets, tiny_model_dir, objective=VarianceAware(), reward_clip=0.1, missing_eos_penalty=2.0
    )
    assert 0 < clipped.stopped.sum() < len(clipped.stopped)
    for i, mean in enumerate(clipped.estimate.mean.tolist()):
        expected = max(-0.1, min(0.1, mean)) - (0.0 if clipped.stopped[i] else 2.0)
        assert clipped.reward[i].item() == pytest.approx(expected, rel=1e-5)


def test_a_reward_that_is_not_finite_names_its_prompt(tiny_model_dir, reward):
    networks = ppo_helpers.networks(tiny_model_dir, reward)
    networks.scorer.model.head.bias[1] = float("nan")
    with pytest.raises(ValueError, match=rf"expected finite rewards, got nan for prompt '{ppo_helpers.PROMPTS[0]}'"):
        ppo_helpers.make_rollout(networks, tiny_model_dir)


def test_statistics_against_loops(nets, tiny_model_dir):
    made = ppo_helpers.make_rollout(nets, tiny_model_dir, objective=VarianceAware(), gold=LengthJudge())
    rows = range(len(made.prompts))
    sizes = made.response_mask.sum(1).tolist()
    ratios = [sum((made.logprobs[i, t] - made.ref_logprobs[i, t]).item() for t in range(sizes[i])) for i in rows]
    members = made.estimate.members.tolist()
    means = [sum(m) / 3 for m in members]
    variances = [sum((x - mu) ** 2 for x in m) / 2 for m, mu in zip(members, means, strict=True)]
    weights = [max(0.1, min(10.0, v / float(nets.scorer.head.reference_variance))) for v in variances]
    k3 = [math.exp(-x) - 1 + x for x in ratios]
    count = len(made.prompts)

    def mean(values):
        return sum(values) / len(values)

    expected = {
        "reward_mean": mean(means),
        "reward_std": math.sqrt(mean([(x - mean(means)) ** 2 for x in means])),
        "objective_reward": mean(means),
        "ensemble_sigma": mean([math.sqrt(v) for v in variances]),
        "kl_k1": mean(ratios),
        "kl_k3": mean(k3),
        "kl_weighted_k3": mean([w * k for w, k in zip(weights, k3, strict=True)]),
        "kl_weight_mean": mean(weights),
        "kl_weight_max": max(weights),
        "entropy": sum(made.entropy[i, t].item() for i in rows for t in range(sizes[i])) / sum(sizes),
        "response_length": sum(sizes) / count,
        "response_length_std": statistics.pstdev(sizes),
        "eos_rate": sum(made.stopped.tolist()) / count,
        "gold": mean([len(r) for r in made.responses]),
        "gold_std": statistics.pstdev(len(r) for r in made.responses),
        **{f"reward_member_{k}": mean([m[k] for m in members]) for k in range(3)},
    }
    assert abs(expected["kl_k1"]) > 1e-3
    found = {name: value.item() for name, value in rollout_statistics(made).items()}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_samples_say_everything_about_each_response(nets, tiny_model_dir):
    made = ppo_helpers.make_rollout(nets, tiny_model_dir, objective=VarianceAware(), gold=LengthJudge())
    records = sample_rows(made, "policy", torch.arange(6) + 7)
    assert [r["prompt"] for r in records] == ppo_helpers.PROMPTS
    for i, record in enumerate(records):
        assert set(record) == {
            "policy", "prompt_id", "response_number", "prompt", "response", "stopped", "length", "reward", "sigma",
            "members", "objective_reward", "kl", "kl_weight", "entropy", "gold"
        }  # fmt: skip
        assert (record["prompt_id"], record["response_number"]) == (i + 7, 0)
        assert record["stopped"] is bool(made.stopped[i])
        assert record["length"] == int(made.response_mask[i].sum())
        assert record["members"] == pytest.approx(made.estimate.members[i].tolist(), abs=1e-6)
        assert record["reward"] == pytest.approx(sum(record["members"]) / 3, abs=1e-5)
        assert record["sigma"] ** 2 == pytest.approx(made.estimate.members[i].var().item(), rel=1e-4)
        assert record["kl"] == pytest.approx(made.log_ratio[i].item())
        assert record["gold"] == len(made.responses[i])


def test_texts_are_those_of_the_sampled_tokens(rollout, tiny_model_dir):
    tokenizer = load_tokenizer(Pretrained(tiny_model_dir))
    for i, response in enumerate(rollout.responses):
        start, end = int(rollout.rows.prompt_lengths[i]), int(rollout.rows.lengths[i])
        assert response == tokenizer.decode(rollout.rows.input_ids[i, start:end], skip_special_tokens=True)
        prompt = tokenizer(rollout.prompts[i])["input_ids"]
        assert rollout.rows.input_ids[i, :start].tolist() == prompt


def test_reference_features_are_those_of_reference_responses(nets, tiny_model_dir, reward):
    scorer = ppo_helpers.maker(nets, tiny_model_dir)
    batch = ppo_helpers.prompt_batch(tiny_model_dir)
    torch.manual_seed(3)
    (tap,) = nets.scorer.taps
    features = torch.cat([responses.pooled[tap] for responses in scorer.references([batch, batch])])
    assert features.shape == (12, 32)
    torch.manual_seed(3)
    tokenizer = load_tokenizer(Pretrained(tiny_model_dir))
    lm = load_causal_lm(Pretrained(tiny_model_dir))
    sequences = sample_references(lm, tokenizer, [batch, batch], scorer.sampling)
    assert all(isinstance(s, TokenSequence) for s in sequences)
    backbone = load_backbone(Pretrained(tiny_model_dir))
    expected = compute_features(
        RewardModel(FeatureSpec(Pretrained(tiny_model_dir)), HeadEnsemble(3), backbone), sequences, torch.device("cpu")
    )
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_the_reference_s_own_log_ratio_is_zero(nets, tiny_model_dir):
    made = ppo_helpers.make_rollout(nets, tiny_model_dir, role="reference")
    assert torch.equal(made.log_ratio, torch.zeros(6))


def test_an_estimate_without_members_has_no_member_statistics(rollout):
    bare = SimpleNamespace(**vars(rollout))
    bare.estimate = RewardEstimate(rollout.estimate.mean, rollout.estimate.variance, None)
    bare.log_ratio, bare.response_mask = rollout.log_ratio, rollout.response_mask
    assert not [name for name in rollout_statistics(bare) if "member" in name]
    assert sample_rows(bare, "policy", torch.arange(6))[0]["members"] == []


def test_impossible_sampling_is_refused():
    with pytest.raises(ValueError, match=r"sampling.temperature: expected a number above 0, got 0"):
        Sampling(temperature=0)
    with pytest.raises(ValueError, match=r"sampling.max_new_tokens: expected at least 1, got 0"):
        Sampling(max_new_tokens=0)
