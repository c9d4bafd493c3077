"""PPO ends at the weights that it ended at before rewards had one door: float32, one thread, the same seed.

`tests/recorded/ppo.json` was written by the code of commit 5f4e94f with this file run as a script.
"""

import json
from pathlib import Path

import helpers
import ppo_helpers
import pytest
import torch

from lit_vapo.advantages.rloo import Rloo
from lit_vapo.models import transformers_generator
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Lora, Pretrained, decoder_layers, freeze, load_backbone
from lit_vapo.objectives.covariance_aware import CovarianceAware
from lit_vapo.objectives.lower_confidence import LowerConfidence
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards.ensemble import PlacedEnsemble
from lit_vapo.rewards.members.full import FullEnsemble
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.stages.ppo.update import PPOUpdate

RECORDED = Path(__file__).parent / "recorded" / "ppo.json"
STOPS = list(range(60))


def saved(folder, head, spec, calibrated=True):
    """An ensemble with a backbone of its own kind, saved into `folder`."""
    head.build(32)
    backbone = None
    if not isinstance(head, HeadEnsemble):
        backbone = freeze(load_backbone(spec.base, spec.layer))
        backbone = head.attach(backbone, decoder_layers(backbone))
        for i, parameter in enumerate(p for n, p in head.named_parameters() if "lora_b" in n):
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
    if calibrated:
        shape = (64, 32) if backbone is None else (64, head.num_members, 32)
        head.calibrate(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    RewardModel(spec, head, backbone).save_pretrained(folder)
    return str(folder)


def case(name, model, other, folder):
    """A small run: the reward and what differs from the others' options."""
    own = Pretrained(model)
    if name == "heads on the policy's base":
        reward = saved(folder, HeadEnsemble(5, moderated=False), FeatureSpec(own, None, "mean", [0]))
        return reward, {"objective": VarianceAware()}
    if name == "heads on an inner layer, not calibrated":
        reward = saved(folder, HeadEnsemble(5, moderated=False), FeatureSpec(own, 1, "mean", [0]), calibrated=False)
        return reward, {"objective": VarianceAware(), "critic": CriticSpec("lora"), "num_reference": 8}
    if name == "adapters on the policy's base":
        reward = saved(folder, LoraEnsemble(2, rank=4, moderated=False), FeatureSpec(own))
        return reward, {"objective": CovarianceAware(), "critic": CriticSpec("own")}
    if name == "whole members":
        reward = saved(folder, FullEnsemble(2, moderated=False), FeatureSpec(own))
        sampling = Sampling(6, stop_token_ids=STOPS, num_responses=2)
        return reward, {"objective": LowerConfidence(), "advantage": Rloo(), "sampling": sampling}
    assert name == "heads on another base, all weights trained"
    reward = saved(
        folder, HeadEnsemble(5, moderated=False), FeatureSpec(Pretrained(other), None, "last", [0]), calibrated=False
    )
    return reward, {"objective": VarianceAware(), "lora": None, "num_reference": 8, "learning_rate": 1e-3}


CASES = [
    "heads on the policy's base",
    "heads on an inner layer, not calibrated",
    "adapters on the policy's base",
    "whole members",
    "heads on another base, all weights trained",
]


def train(name, folder):
    """The trained weights of a small run, and the figures of its iterations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = helpers.tiny_model(folder / "model", helpers.tiny_tokenizer(folder / "model"))
        other = helpers.tiny_model(folder / "other", helpers.tiny_tokenizer(folder / "other", True), seed=1)
        reward, options = case(name, model, other, folder / "reward")
        torch.manual_seed(0)
        module = ppo_helpers.ppo_module(
            model, reward, **{"sampling": Sampling(6, stop_token_ids=STOPS), "lora": Lora(4, 16.0), **options}
        )
        rows = ppo_helpers.fit_ppo(module, ppo_helpers.prompt_data(model, folder), folder / "run")
    finally:
        torch.set_num_threads(threads)
    return ppo_helpers.state(module), rows


def figures(state, rows):
    """Sum and length of each trained tensor, in order, and what the run said of its last iteration."""
    said = ("train/reward_mean", "train/ensemble_sigma", "train/kl_weight_mean", "train/kl_k3", "train/policy_loss")
    return {
        "weights": [[float(x.double().sum()), float(x.double().norm())] for x in state.values()],
        "said": {key: rows[-1][key] for key in said},
    }


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_of_before(name, tmp_path, monkeypatch):
    # Halves of a minibatch add up in another order, and Adam makes of rounding what it may move a weight.
    monkeypatch.setattr(PPOUpdate, "_probe", lambda *_: None)
    # Critics started from heads that read means of states, too.
    monkeypatch.setattr(PlacedEnsemble, "linear_mean", lambda source: source.head.linear_mean())
    # Tokens were drawn by a random number for each word of the vocabulary.
    monkeypatch.setattr(transformers_generator, "draw", lambda p: torch.multinomial(p, num_samples=1)[:, 0])
    found, known = figures(*train(name, tmp_path)), json.loads(RECORDED.read_text())[name]
    # Log-probabilities come from sampling since, where cached keys round them otherwise.
    torch.testing.assert_close(torch.tensor(found["weights"]), torch.tensor(known["weights"]), atol=5e-5, rtol=1e-5)
    assert found["said"] == pytest.approx(known["said"], rel=1e-5, abs=1e-5)


if __name__ == "__main__":
    import sys
    from tempfile import TemporaryDirectory

    runs = {}
    for each in CASES:
        with TemporaryDirectory() as scratch:
            runs[each] = train(each, Path(scratch))
    if sys.argv[1:]:
        torch.save({name: state for name, (state, _) in runs.items()}, sys.argv[1])
    else:
        RECORDED.parent.mkdir(exist_ok=True)
        RECORDED.write_text(json.dumps({name: figures(*run) for name, run in runs.items()}, indent=1) + "\n")
