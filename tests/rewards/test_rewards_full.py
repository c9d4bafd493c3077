"""Members that are whole models: each reads the pairs that its bootstrap counts."""

from contextlib import nullcontext

import pytest
import torch

from lit_vapo.functional import poisson_bootstrap
from lit_vapo.models.pretrained import Pretrained, decoder_layers, freeze, hidden_size, load_backbone
from lit_vapo.rewards.members.full import FullEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.types import PairLabels

PAIRS = 6


def reward_model(folder, member=None, pooling="last", checkpointing=False):
    base = Pretrained(folder, gradient_checkpointing=checkpointing)
    head = FullEnsemble(3, centering=0.1)
    if member is not None:
        head.select(member)
    head.build(hidden_size(base))
    backbone = freeze(load_backbone(base))
    return RewardModel(FeatureSpec(base, None, pooling), head, head.attach(backbone, decoder_layers(backbone)))


def batch():
    """Pairs of sequences of different lengths, chosen ones first, and their labels."""
    make = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (2 * PAIRS,), generator=make)
    ids = torch.randint(3, 60, (2 * PAIRS, 11), generator=make)
    ones = torch.ones(PAIRS)
    return (ids, lengths, torch.full((2 * PAIRS,), 2)), PairLabels(0 * ones, ones, ones, torch.arange(PAIRS))


def learned(model, skips, weights=None, monkeypatch=None):
    """The loss, all gradients, and how many rows each member's backbone read."""
    if weights is not None:
        monkeypatch.setattr(FullEnsemble, "pair_weights", lambda *_: torch.tensor(weights))
    inputs, labels = batch()
    rows = []
    for member in model.backbone:
        member.register_forward_pre_hook(lambda module, args, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    with model.head.learning_from(labels) if skips else nullcontext():
        features = model.encode(*inputs)
    loss = model.head.loss(features[:PAIRS], features[PAIRS:], labels)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())], rows


def same(whole, few):
    for x, y in zip(whole, few, strict=True):
        torch.testing.assert_close(y, x, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("member", [None, 1])
def test_pairs_that_the_bootstrap_leaves_out_are_not_read(tiny_model_dir, member, pooling, checkpointing):
    whole, every = learned(reward_model(tiny_model_dir, member, pooling, checkpointing), skips=False)
    model = reward_model(tiny_model_dir, member, pooling, checkpointing)
    few, rows = learned(model, skips=True)
    same(whole, few)
    assert whole[0] > 0
    counted = (poisson_bootstrap(torch.arange(PAIRS), 3, seed=0) > 0).sum(0).tolist()
    assert len(set(counted)) > 1
    expected = [2 * n for n in (counted if member is None else counted[member : member + 1])]
    assert rows == expected
    assert every == [2 * PAIRS for _ in expected]
    # Outside, all is read.
    assert model.encode(*batch()[0]).shape == (2 * PAIRS, len(expected), 32)
    assert rows == [*expected, *every]


@pytest.mark.parametrize(
    ("weights", "read"),
    [
        ([[1.0, 1.0, 0.0]] * 3 + [[0.0, 1.0, 0.0]] * 3, [6, 12, 2]),  # a member for which nothing counts
        ([[0.0] * 3] * 6, [2, 2, 2]),
        ([[1.0] * 3] * 6, [12, 12, 12]),
    ],
)
def test_whatever_pairs_count_every_member_has_its_gradients(tiny_model_dir, monkeypatch, weights, read):
    whole, _ = learned(reward_model(tiny_model_dir), False, weights, monkeypatch)
    few, rows = learned(reward_model(tiny_model_dir), True, weights, monkeypatch)
    same(whole, few)
    assert rows == read
