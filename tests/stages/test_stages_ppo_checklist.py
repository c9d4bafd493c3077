"""Lines of the checklist in docs/ppo.md that no other file tests: where responses end, dropout, what is refused."""

import helpers
import ppo_helpers
import pytest
import torch
from ppo_helpers import fit_ppo, ppo_module, prompt_data

import lit_vapo.stages.ppo.module as ppo
from lit_vapo.advantages.gae import Gae
from lit_vapo.cli import main
from lit_vapo.data.collate import PromptBatch
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Pretrained, load_tokenizer
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.rollout import RolloutMaker
from lit_vapo.stages.ppo.experience import compute_advantages
from lit_vapo.stages.ppo.update import UpdateSettings

EOS = list(range(24))  # ends of sequence of the model; 0 is the padding too
OTHER = list(range(24, 48))  # stop tokens of the user


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A rollout of a model whose padding is an end of sequence, from prompts full of stop tokens; and its parts."""
    folder = tmp_path_factory.mktemp("ended")
    path = helpers.tiny_model(folder / "model", helpers.tiny_tokenizer(folder / "model", pad=False))
    reward = ppo_helpers.ensemble(folder / "ensemble", path)
    nets = ppo_helpers.networks(path, reward)
    nets.policy.causal_lm.generation_config.eos_token_id = EOS
    # Left-padded with token 0; the last real token of a prompt is a stop token as well.
    prompts = [[0, 30, 70, 1], [5, 0], [90, 91, 92, 93, 26]] * 16
    size = max(map(len, prompts))
    ids = torch.tensor([[0] * (size - len(p)) + p for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts])
    batch = PromptBatch(ids, lengths, [""] * len(prompts), torch.arange(len(prompts)))
    sampling, tokenizer = Sampling(7, 1.0, OTHER), load_tokenizer(Pretrained(path))
    maker = RolloutMaker(nets, nets.scorer, tokenizer, sampling, missing_eos_penalty=3.0)
    torch.manual_seed(0)
    return maker.make(batch, MeanReward()), prompts, RewardModel.from_pretrained(reward)


def ways(made, prompts):
    """How each response ended, read off its tokens: (row, tokens, way)."""
    for i, prompt in enumerate(prompts):
        row = made.rows.input_ids[i].tolist()
        assert row[: len(prompt)] == prompt
        response = row[len(prompt) : len(prompt) + 7]
        ends = [t for t, token in enumerate(response) if token in EOS + OTHER]
        response = response[: ends[0] + 1] if ends else response
        way = "length" if not ends else "eos" if response[-1] in EOS else "stop"
        yield i, response, "padding" if ends and response[-1] == 0 else way


def test_every_way_to_end_is_there(ended):
    made, prompts, _ = ended
    seen = {way for _, _, way in ways(made, prompts)}
    assert {"eos", "stop", "length"} <= seen


def test_a_response_is_cut_after_its_first_stop_token_and_nowhere_else(ended):
    made, prompts, _ = ended
    for i, response, way in ways(made, prompts):
        assert made.response_mask[i].tolist() == [t < len(response) for t in range(made.response_mask.shape[1])]
        assert bool(made.stopped[i]) == (way != "length")


def test_the_score_is_that_of_the_last_real_token_and_lands_there(ended):
    made, prompts, own = ended
    raw = Gae(gamma=0.0, whiten=False)
    made.values.zero_()
    # With γ = 0, no values and no price, an advantage is the token's own reward.
    rewards = compute_advantages(made, 0.0, raw, lambda x: x).advantages
    for i, response, way in ways(made, prompts):
        ids = prompts[i] + response
        score = own(torch.tensor([ids]), torch.tensor([len(ids)]), torch.tensor([len(prompts[i])])).mean.item()
        expected = [0.0] * rewards.shape[1]
        expected[len(response) - 1] = score - 3.0 * (way == "length")
        assert rewards[i].tolist() == pytest.approx(expected, abs=1e-4), way


def test_dropout_is_off_in_sampling_scoring_and_updates(tmp_path, monkeypatch):
    # Policy, reward backbone and the critic's own trunk all have dropout, and a validation comes in between.
    dropout = {"kind": "gpt2", "resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}
    path = helpers.tiny_model(tmp_path / "policy", helpers.tiny_tokenizer(tmp_path / "policy"), **dropout)
    other = helpers.tiny_model(tmp_path / "other", helpers.tiny_tokenizer(tmp_path / "other"), seed=3, **dropout)
    head = HeadEnsemble(3)
    head.build(32)
    head.calibrate(torch.randn(64, 32))
    RewardModel(FeatureSpec(Pretrained(other)), head, None).save_pretrained(tmp_path / "ensemble")
    made, make = [], ppo.RolloutMaker.make

    def watched(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(ppo.RolloutMaker, "make", watched)
    module = ppo_module(path, str(tmp_path / "ensemble"), critic=CriticSpec("own"), update=UpdateSettings(1, 2))
    data = prompt_data(path, tmp_path, validation_fraction=0.25)
    rows = fit_ppo(module, data, tmp_path, limit_val_batches=1, limit_train_batches=2, val_check_interval=1)
    assert [row["train/first_ratio_max"] for row in rows] == pytest.approx([1, 1], abs=1e-5)
    own = RewardModel.from_pretrained(str(tmp_path / "ensemble"))
    for rollout in made:
        # The tokenizers are alike, so the ensemble reads the policy's own tokens.
        fresh = own(rollout.rows.input_ids, rollout.rows.lengths, rollout.rows.prompt_lengths)
        torch.testing.assert_close(rollout.estimate.members, fresh.members, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("option", ["top_k=50", "top_p=0.9", "min_p=0.1"])
def test_sampling_that_would_make_old_log_probabilities_wrong_cannot_be_asked_for(stage_args, tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        main(stage_args("ppo", "fit", tmp_path, f"--model.sampling.{option}", model__reward="anything"))
    error = capsys.readouterr().err
    assert "model.sampling" in error
    assert option.split("=")[0] in error


def test_defaults_are_those_of_the_checklist():
    settings, gae = UpdateSettings(), Gae()
    assert (gae.gamma, gae.gae_lambda, gae.whiten) == (1.0, 0.95, True)
    assert (settings.clip_range, settings.value_clip_range, settings.value_coef) == (0.2, 0.2, 0.1)
    assert settings.epochs > 1
    assert settings.minibatches > 1
    assert settings.max_grad_norm == 1.0
    assert Sampling().temperature == 1.0
