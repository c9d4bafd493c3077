"""What a run keeps of its source of rewards, and what no source may give without a word."""

from types import SimpleNamespace

import helpers
import ppo_helpers
import public_helpers as public
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_vapo.models.pretrained import Lora, Pretrained, load_tokenizer
from lit_vapo.rewards import EnsembleReward, FunctionReward, HeldEnsemble, load_reward
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.normaliser import Normaliser
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.rollout import Encoders

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def test_a_member_that_says_the_same_of_every_response_has_no_unit():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
    with pytest.raises(ValueError, match=r"member 0: expected different rewards of the reference's 3 resp.* got 0"):
        Normaliser(2).fit_to(rewards)
    normaliser = Normaliser(2)
    normaliser.fit_to(rewards + torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert bool(normaliser.calibrated)


def test_a_variance_that_is_not_finite_is_no_unit():
    normaliser = Normaliser(2)
    with pytest.raises(ValueError, match="expected a finite variance of members on the reference's responses, got inf"):
        normaliser.measure(torch.tensor([1.0, float("inf")]))
    assert not bool(normaliser.calibrated)


def test_a_function_whose_rewards_float32_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr("reward_functions.huge", lambda completions: [1e300 for _ in completions], raising=False)
    source = FunctionReward("reward_functions.huge")
    source.prepare(None)
    with pytest.raises(ValueError, match=r"expected finite numbers or None, got 1e\+300"):
        source.score(public.responses())


def test_none_is_no_reward_wherever_one_is_needed(monkeypatch):
    monkeypatch.setattr("reward_functions.odd", lambda completions: [None, 1.0, 2.0], raising=False)
    source = FunctionReward("reward_functions.odd")
    source.prepare(None)
    assert source.score(public.responses()).applies.tolist() == [False, True, True]
    with pytest.raises(ValueError, match="expected a reward of each response, got none .* for prompt"):
        source.estimate(public.responses())


def test_a_held_ensemble_reads_its_own_base_alone(tiny_model_dir, tmp_path):
    other = helpers.tiny_model(tmp_path / "other", helpers.tiny_tokenizer(tmp_path / "other"), seed=3)
    head = HeadEnsemble(2)
    head.build(32)
    held = HeldEnsemble(RewardModel(FeatureSpec(Pretrained(other)), head, None))
    policy = SimpleNamespace(base=Pretrained(tiny_model_dir))
    with pytest.raises(ValueError, match="expected a policy on the base that its heads read, '.*other', got"):
        held.prepare(policy)
    held.prepare(SimpleNamespace(base=Pretrained(other)))
    with pytest.raises(ValueError, match="expected heads that share frozen hidden states, got LoraEnsemble"):
        HeldEnsemble(RewardModel(FeatureSpec(Pretrained(other)), LoraEnsemble(2), None))


def test_an_ensemble_is_placed_anew_for_another_policy(tiny_model_dir, tmp_path):
    other = helpers.tiny_model(tmp_path / "other", helpers.tiny_tokenizer(tmp_path / "other"), seed=3)
    source = EnsembleReward(ppo_helpers.ensemble(tmp_path / "ensemble", tiny_model_dir))
    first, second = (SimpleNamespace(base=Pretrained(path)) for path in (tiny_model_dir, other))
    source.prepare(first)
    assert source.taps
    kept = source.model
    source.prepare(first)
    assert source.model is kept
    source.prepare(second)
    assert not source.taps
    assert source.model.backbone is not None


def test_two_tokenizers_of_one_path_write_for_themselves(tiny_model_dir, tmp_path):
    helpers.tiny_tokenizer(tmp_path / "other", pad=False)
    one, other = load_tokenizer(Pretrained(tiny_model_dir)), load_tokenizer(Pretrained(str(tmp_path / "other")))
    other.add_tokens(["film"])
    encode = Encoders().writer(public.responses(["the film"], [" was"]).prompts, [" was"], [False])
    found = [encode(tokenizer, tiny_model_dir)[0].ids for tokenizer in (one, other)]
    assert found[0] != found[1]


def run(model, reward, folder, ckpt_path=None, **options):
    """A short run with a checkpoint; its module."""
    folder.mkdir(exist_ok=True)
    module = ppo_helpers.ppo_module(model, reward, num_reference=4, lora=Lora(4, 16.0))
    keep = ModelCheckpoint(folder / "ckpt", save_last=True)
    data = ppo_helpers.prompt_data(model, folder)
    options = {"limit_train_batches": 1, "callbacks": [keep], "enable_checkpointing": True, **options}
    ppo_helpers.fit_ppo(module, data, folder, ckpt_path, **options)
    return module


def test_a_checkpoint_knows_its_own_rewards_alone(tiny_model_dir, tmp_path, caplog):
    first = ppo_helpers.ensemble(tmp_path / "first", tiny_model_dir)
    head = HeadEnsemble(3, seed=7)
    head.build(32)
    head.calibrate(torch.randn(64, 32, generator=torch.Generator().manual_seed(5)))
    RewardModel(FeatureSpec(Pretrained(tiny_model_dir)), head, None).save_pretrained(tmp_path / "second")
    trained = run(tiny_model_dir, first, tmp_path)
    last = tmp_path / "ckpt" / "last.ckpt"
    same = run(tiny_model_dir, first, tmp_path / "same", last, max_epochs=2)
    assert torch.equal(same.reward.head.weight, trained.reward.head.weight)
    assert "reward: the checkpoint's was" not in caplog.text
    other = run(tiny_model_dir, str(tmp_path / "second"), tmp_path / "other", last, max_epochs=2)
    assert torch.equal(other.reward.head.weight, head.weight)
    assert torch.equal(other.reward.head.reward_loc, head.reward_loc)
    assert "reward: the checkpoint's was" in caplog.text


def test_all_processes_take_the_first_ones_calibration(tiny_model_dir, tmp_path):
    reward = ppo_helpers.ensemble(tmp_path / "raw", tiny_model_dir, calibrated=False)
    module = ppo_helpers.ppo_module(tiny_model_dir, reward)
    module.reward = load_reward(reward)
    module.reward.put(SimpleNamespace(model=RewardModel.from_pretrained(reward, with_backbone=False), taps=()))

    def told(state):
        # What the first process would have found.
        return {name: torch.full_like(x, 3) if "reward_loc" in name else x for name, x in state.items()}

    module._trainer = SimpleNamespace(strategy=SimpleNamespace(broadcast=told))
    module.reward.calibrate = lambda references: None
    module.calibrate([])
    assert module.reward.head.reward_loc.tolist() == [3.0, 3.0, 3.0]
