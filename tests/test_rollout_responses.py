"""Rollouts of several responses to a prompt, of a minimum length, ended by strings, and by other generators."""

import warnings

import ppo_helpers
import pytest
import torch
from jsonargparse import ArgumentParser
from ppo_helpers import LoneModule

from lit_vapo.advantages.gae import Gae
from lit_vapo.data.collate import PromptBatch
from lit_vapo.models.generation import Generated, Generator, Sampling, stop_ids
from lit_vapo.models.pretrained import Pretrained, load_causal_lm, load_tokenizer
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.rollout import RolloutMaker, assemble_rows, sample_references
from lit_vapo.stages.ppo.experience import compute_advantages
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.update import PPOUpdate, UpdateSettings
from lit_vapo.types import TextReward

HALF = list(range(160))


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("responses") / "ensemble", tiny_model_dir)


@pytest.fixture(scope="module")
def nets(tiny_model_dir, reward):
    return ppo_helpers.moved_networks(tiny_model_dir, reward)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(Pretrained(tiny_model_dir))


@pytest.fixture
def make(nets, tokenizer, tiny_model_dir):
    """Makes a rollout with a sampling and options of the maker."""

    def rollout(sampling, role="actor", **options):
        torch.manual_seed(0)
        maker = RolloutMaker(nets, nets.scorer, tokenizer, sampling, **options)
        return maker.make(ppo_helpers.prompt_batch(tiny_model_dir), MeanReward(), role), maker

    return rollout


@torch.no_grad()
def brute(nets, role, rollout, temperature, minimum):
    """Log-probabilities and entropies, a row at a time, without the logits of stop tokens at the first tokens."""
    logprobs, entropies = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
    rows = rollout.rows
    for i, (start, end) in enumerate(zip(rows.prompt_lengths.tolist(), rows.lengths.tolist(), strict=True)):
        with nets.policy.acting_as(role) as lm:
            logits = lm(input_ids=rows.input_ids[i : i + 1, :end]).logits[0].double() / temperature
        for t in range(end - start):
            left = [v for v in range(logits.shape[1]) if t >= minimum or v not in HALF]
            distribution = torch.distributions.Categorical(logits=logits[start + t - 1, left])
            logprobs[i, t] = distribution.log_prob(torch.tensor(left.index(int(rows.input_ids[i, start + t]))))
            entropies[i, t] = distribution.entropy()
    return logprobs, entropies


class WordJudge(TextReward):
    def __call__(self, prompts, responses):
        return torch.tensor([float(len(p) * 1000 + len(r)) for p, r in zip(prompts, responses, strict=True)])


@pytest.mark.parametrize("minimum", [0, 2])
def test_every_response_has_the_log_probabilities_of_its_own_row(nets, make, minimum):
    sampling = Sampling(6, 0.7, HALF, num_responses=3, min_new_tokens=minimum)
    rollout, _ = make(sampling)
    assert len(rollout.prompts) == len(rollout.responses) == len(rollout.reward) == 18
    assert rollout.response_mask.sum(1).unique().numel() > 2
    assert int(rollout.response_mask.sum(1).min()) == minimum + 1
    for name, role in (("logprobs", "actor"), ("ref_logprobs", "reference")):
        logprobs, entropies = brute(nets, role, rollout, 0.7, minimum)
        torch.testing.assert_close(getattr(rollout, name), logprobs, atol=1e-4, rtol=1e-4)
        if role == "actor":
            torch.testing.assert_close(rollout.entropy, entropies, atol=1e-4, rtol=1e-4)


def test_rows_of_a_prompt_stand_together(make, tokenizer):
    rollout, _ = make(Sampling(5, stop_token_ids=HALF, num_responses=3), gold=WordJudge())
    assert rollout.num_responses == 3
    for i, prompt in enumerate(ppo_helpers.PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        for j in range(3 * i, 3 * i + 3):
            assert rollout.prompts[j] == prompt
            assert rollout.rows.input_ids[j, : len(ids)].tolist() == ids
            assert int(rollout.rows.prompt_lengths[j]) == len(ids)
            assert rollout.gold[j] == len(prompt) * 1000 + len(rollout.responses[j])


def test_an_empty_response_among_several_is_refused_by_its_prompt():
    batch = PromptBatch(torch.tensor([[1], [2]]), torch.tensor([1, 1]), ["first", "second"], torch.arange(2))
    lengths = torch.tensor([1, 1, 0, 1])
    with pytest.raises(ValueError, match=r"got none for prompt 'second'"):
        assemble_rows(batch, Generated(torch.full((4, 1), 3), lengths, lengths > 1))
    with pytest.raises(ValueError, match=r"expected equally many responses to each of 2 prompts, got 3"):
        assemble_rows(batch, Generated(torch.full((3, 1), 3), lengths[:3] + 1, lengths[:3] > 1))


def test_the_first_ratio_is_one_under_a_minimum_length(nets, make):
    rollout, maker = make(Sampling(6, 0.7, HALF, num_responses=2, min_new_tokens=2))
    experience = compute_advantages(rollout, 0.05, Gae(), lambda x: x)
    still = torch.optim.SGD(nets.parameters(), lr=0.0)
    report = PPOUpdate(LoneModule(), nets, UpdateSettings(1, 2), maker.shaping).run(experience, still)
    for name in ("ratio", "ratio_max"):
        assert report[name].item() == pytest.approx(1.0, abs=1e-5)
    # Gradients pass by the logits that were taken out.
    assert 0 < report["actor_grad_norm"] < float("inf")


def test_the_kl_of_a_reference_to_itself_is_zero_under_a_minimum_length(make):
    rollout, _ = make(Sampling(6, 0.7, HALF, num_responses=2, min_new_tokens=2), role="reference")
    assert not rollout.log_ratio.any()


def test_a_minimum_length_needs_a_stop_token(tiny_model_dir, monkeypatch):
    lm = load_causal_lm(Pretrained(tiny_model_dir))
    for config in (lm.generation_config, lm.config):
        monkeypatch.setattr(config, "eos_token_id", None)
    with pytest.raises(ValueError, match=r"min_new_tokens: expected 0 for a model without stop tokens, got 3"):
        stop_ids(lm, Sampling(min_new_tokens=3), None)


def test_a_stop_string_ends_a_response_like_a_stop_token(make, tokenizer):
    rollout, _ = make(Sampling(16, num_responses=8, stop_strings=["e", "o"]), missing_eos_penalty=5.0)
    assert 0 < rollout.stopped.sum() < 48
    lengths = rollout.response_mask.sum(1).tolist()
    for i, text in enumerate(rollout.responses):
        start = int(rollout.rows.prompt_lengths[i])
        before = tokenizer.decode(rollout.rows.input_ids[i, start : start + lengths[i] - 1], skip_special_tokens=True)
        assert "e" not in before
        assert "o" not in before
        last = int(rollout.rows.input_ids[i, start + lengths[i] - 1])
        if rollout.stopped[i] and last != tokenizer.eos_token_id:
            # A special token's name counts, too.
            assert "e" in text + tokenizer.decode(last) or "o" in text + tokenizer.decode(last)
        penalty = 0.0 if rollout.stopped[i] else 5.0
        assert rollout.reward[i].item() == pytest.approx(float(rollout.estimate.mean[i]) - penalty, abs=1e-5)


def test_rewards_sit_on_the_token_that_completes_a_stop_string(make):
    rollout, _ = make(Sampling(16, num_responses=8, stop_strings=["e", "o"]))
    rollout.values.zero_()
    plain = Gae(gae_lambda=0.0, whiten=False)
    rewards = compute_advantages(rollout, 0.0, plain, lambda x: x).advantages
    last = rollout.response_mask.sum(1) - 1
    expected = torch.zeros_like(rewards).scatter(1, last[:, None], rollout.reward[:, None])
    torch.testing.assert_close(rewards, expected)


def test_a_rollout_in_which_nothing_ended_is_told_of_once(nets, tokenizer, tiny_model_dir):
    torch.manual_seed(0)
    maker, batch = RolloutMaker(nets, nets.scorer, tokenizer, Sampling(1)), ppo_helpers.prompt_batch(tiny_model_dir)
    with pytest.warns(UserWarning, match=r"^0 of 6 responses \(0%\) ended by themselves, all were cut off at 1 tokens"):
        maker.make(batch, MeanReward())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maker.make(batch, MeanReward())
        # One response that ended is enough, and so is nothing that could end one.
        ppo_helpers.make_rollout(nets, tiny_model_dir)
        endless = RolloutMaker(nets, nets.scorer, tokenizer, Sampling(1))
        endless.stops = []
        endless.make(batch, MeanReward())


def test_calibration_takes_one_response_to_each_prompt(nets, tokenizer, tiny_model_dir):
    sampling, batch = Sampling(3, num_responses=4), ppo_helpers.prompt_batch(tiny_model_dir)
    found = list(RolloutMaker(nets, nets.scorer, tokenizer, sampling).references([batch, batch]))
    assert [len(responses) for responses in found] == [6, 6]
    assert len(sample_references(load_causal_lm(Pretrained(tiny_model_dir)), tokenizer, [batch], sampling)) == 6


class Parrot(Generator):
    """Answers each prompt with its last token, as often as asked."""

    def __call__(self, lm, tokenizer, prompt_ids, prompt_lengths, sampling, stops):
        answers = prompt_ids[:, -1:].repeat_interleave(sampling.num_responses, 0)
        return Generated(answers, torch.ones(len(answers), dtype=torch.long), torch.ones(len(answers)) > 0)


def test_another_generator_may_answer(tiny_model_dir, reward, tmp_path):
    module = ppo_helpers.ppo_module(tiny_model_dir, reward, generator=Parrot(), sampling=Sampling(6, num_responses=2))
    rows = ppo_helpers.fit_ppo(module, ppo_helpers.prompt_data(tiny_model_dir, tmp_path, count=8), tmp_path)
    assert [row["train/response_length"] for row in rows] == [1.0, 1.0]
    assert rows[0]["train/first_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert isinstance(module.maker.generator, Parrot)


def test_several_responses_train(tiny_model_dir, reward, tmp_path):
    module = ppo_helpers.ppo_module(
        tiny_model_dir, reward, sampling=Sampling(6, 1.0, HALF, num_responses=3, min_new_tokens=1)
    )
    (row,) = ppo_helpers.fit_ppo(module, ppo_helpers.prompt_data(tiny_model_dir, tmp_path, count=4), tmp_path)
    assert row["train/first_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert isinstance(module.maker.generator, TransformersGenerator)


def test_a_generator_is_chosen_by_its_class_path():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PPOModule, "model")
    path = "lit_vapo.models.transformers_generator.TransformersGenerator"
    options = ["--model.base.path=x", "--model.reward=y", f"--model.generator={path}", "--model.generator.drop_every=4"]
    chosen = parser.parse_args(options).model.generator
    assert (chosen.class_path, chosen.init_args.drop_every) == (path, 4)
