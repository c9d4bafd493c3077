"""PPO itself, on a task so small that every response can be listed, ends at the optimum that theory gives.

Two prompts of unequal length, three tokens, responses of at most three. The ensemble is a table of scores; policy,
critic, sampling, objective, update and learning-rate schedule are those of any run. The optimum
π*(y) = π0(y)·exp((R(y) − c)/(β·w(y))) comes from `lit_vapo/functional/tabular.py`, which knows nothing of PPO.
"""

import itertools
from types import SimpleNamespace

import helpers
import ppo_helpers
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_vapo.advantages.gae import Gae
from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.functional import ensemble_estimate, optimal_policy
from lit_vapo.models.batching import right_pad
from lit_vapo.models.generation import Sampling, Shaping
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.trunk import Tap, pool
from lit_vapo.objectives.lower_confidence import LowerConfidence
from lit_vapo.objectives.mean_reward import MeanReward
from lit_vapo.objectives.single_reward import SingleReward
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards import RewardSource
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.update import UpdateSettings

TOKENS = ["<eos>", "a", "b"]
PROMPTS = ["b a", "a b b"]
LENGTH = 3
# All that the policy can say: 1 + 2 + 4 responses that a stop token ends, and 8 that the length does.
RESPONSES = [(*y, 0) for n in range(LENGTH) for y in itertools.product((1, 2), repeat=n)]
RESPONSES += list(itertools.product((1, 2), repeat=LENGTH))
MEMBERS = 3
KL_COEF = 0.8
ITERATIONS, BATCH = 60, 512


class Table(RewardSource):
    """Scores looked up by what the reference's pass says of a response."""

    num_members = MEMBERS
    taps = (Tap(None, "last"),)

    def __init__(self, features, scores, reference_variance):
        super().__init__()
        self.register_buffer("features", features)
        self.register_buffer("scores", scores)
        self.register_buffer("reference_variance", reference_variance)

    def score(self, responses):
        (tap,) = self.taps
        distances = torch.cdist(responses.pooled[tap], self.features, compute_mode="donot_use_mm_for_euclid_dist")
        assert distances.amin(1).max() < 1e-4
        return self.looked_up(distances.argmin(1))

    def looked_up(self, index):
        return ensemble_estimate(self.scores[index])._replace(reference_variance=self.reference_variance)


class QuietPPO(PPOModule):
    """PPO that logs nothing."""

    def log(self, *args, **kwargs):
        """Nobody reads it here, and it takes a third of the time."""


def rows(prompt):
    """The prompt with each response."""
    start = [TOKENS.index(word) for word in prompt.split()]
    ids, _ = right_pad([(*start, *y) for y in RESPONSES])
    mask = torch.arange(LENGTH) < torch.tensor([len(y) for y in RESPONSES])[:, None]
    return TokenRows(ids, torch.full((len(ids),), len(start)), mask)


@torch.no_grad()
def enumerate_policy(policy, role):
    """Probability of each response to each prompt (2, n), and its features (2n, H)."""
    probabilities, features = [], []
    for r in map(rows, PROMPTS):
        hidden = policy.hidden(role, r.input_ids, r.lengths).last
        logprobs = policy.logprobs(role, hidden, r.input_ids, r.prompt_lengths, r.response_mask, Shaping()).logprobs
        probabilities.append(logprobs.double().sum(1).exp())
        features.append(pool(hidden, r.lengths, r.prompt_lengths, "last"))
    return torch.stack(probabilities), torch.cat(features)


def scores(varying):
    """Scores (2n, K) whose variance is the same for all responses, or differs more than tenfold."""
    generator = torch.Generator().manual_seed(3)
    count = len(PROMPTS) * len(RESPONSES)
    mean = torch.empty(count, 1, dtype=torch.float64).uniform_(-1, 1, generator=generator)
    noise = torch.randn(count, MEMBERS, generator=generator, dtype=torch.float64)
    noise = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True)
    exponent = torch.empty(count, 1, dtype=torch.float64).uniform_(-0.65, 0.65, generator=generator)
    return mean + 0.5 * noise * (10 ** (exponent / 2) if varying else 1.0)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("closed_form")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(TOKENS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    model = helpers.tiny_model(folder / "model", tokenizer, num_attention_heads=4, seed=3)
    reference, features = enumerate_policy(Policy(Pretrained(model), None), "reference")
    torch.testing.assert_close(reference.sum(1), torch.ones(2, dtype=torch.float64))
    prompts = [{"prompt": PROMPTS[i % 2]} for i in range(BATCH)]
    data = helpers.write_jsonl(folder / "prompts.jsonl", prompts)
    return SimpleNamespace(model=model, reference=reference, features=features, data=data)


def table(task, varying):
    members = scores(varying)
    variance = (task.reference.flatten() * members.var(1)).sum() / len(PROMPTS)
    return Table(task.features, members, variance)


def optimum(task, objective, varying):
    """π* of each prompt (2, n), and the weights."""
    objective.prepare(MEMBERS)
    score = objective(table(task, varying).looked_up(slice(None)))
    parts = zip(score.reward.view(2, -1), task.reference, score.kl_weight.view(2, -1), strict=True)
    return torch.stack([optimal_policy(r, p, KL_COEF, w) for r, p, w in parts]), score.kl_weight


def distance(one, other):
    """Total variation by prompt."""
    return (one - other).abs().sum(1) / 2


def learned(task, objective, varying, folder):
    """What PPO makes of the reference."""
    module = QuietPPO(
        Pretrained(task.model),
        table(task, varying).float(),
        objective,
        sampling=Sampling(LENGTH),
        advantage=Gae(gae_lambda=1.0),
        update=UpdateSettings(value_clip_range=None),
        learning_rate=4e-3,
        critic_learning_rate=3e-2,
        kl_coef=KL_COEF,
    )
    data = PromptDataModule(
        task.model, prompts=task.data, batch_size=BATCH, max_prompt_length=8, validation_fraction=0.0
    )
    ppo_helpers.fit_ppo(module, data, folder, max_epochs=ITERATIONS)
    return enumerate_policy(module.networks.policy, "actor")[0]


@pytest.mark.parametrize(
    ("objective", "varying"),
    [
        (VarianceAware(), True),
        (VarianceAware(), False),
        (SingleReward(1), True),
        (LowerConfidence(0.5), True),
    ],
    ids=["varying_weight", "constant_weight", "one_member", "lower_confidence"],
)
def test_ppo_ends_at_the_optimum(task, objective, varying, tmp_path):
    best, weight = optimum(task, objective, varying)
    assert distance(best, task.reference).min() > 0.15
    assert best.max() < 0.8
    if isinstance(objective, VarianceAware):
        assert (weight.max() > 10 * weight.min()) == varying
    found = learned(task, objective, varying, tmp_path)
    assert distance(found, best).max() < 0.05


def test_without_the_weight_ppo_ends_elsewhere(task, tmp_path):
    best, _ = optimum(task, VarianceAware(), True)
    plain, _ = optimum(task, MeanReward(), True)
    found = learned(task, MeanReward(), True, tmp_path)
    assert distance(found, plain).max() < 0.05
    assert distance(found, best).min() > 0.1
