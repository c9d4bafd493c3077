"""Every estimator on pooled features passes this suite; a new file under lit_vapo/uncertainty/ is found unasked."""

import pytest
import torch
from helpers import concrete_subclasses

import lit_vapo.uncertainty
from lit_vapo.functional import margin_estimate
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.reward import FeatureSpec, RewardModel, build_head
from lit_vapo.uncertainty.base import RewardHead
from lit_vapo.uncertainty.head_ensemble import HeadEnsemble

HIDDEN = 16


HEADS = concrete_subclasses(lit_vapo.uncertainty, RewardHead)


def built(kind, **kwargs):
    head = kind(num_members=4, **kwargs)
    head.build(HIDDEN)
    return head


def features(batch=32, seed=0):
    return torch.randn(batch, HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_head_ensemble_is_discovered():
    assert HeadEnsemble in HEADS


@pytest.mark.parametrize("kind", HEADS)
class TestEveryHead:
    def test_estimate_has_the_promised_shapes(self, kind):
        estimate = built(kind)(features())
        assert estimate.mean.shape == estimate.variance.shape == (32,)
        assert (estimate.variance >= 0).all()
        assert estimate.members is None or estimate.members.shape == (32, 4)

    def test_half_precision_features_are_scored_in_float32(self, kind):
        assert built(kind)(features().bfloat16()).mean.dtype == torch.float32

    def test_training_lowers_the_loss_and_orders_the_pairs(self, kind):
        torch.manual_seed(0)
        head = built(kind)
        direction = torch.randn(HIDDEN)
        a, b = features(64, 1), features(64, 2)
        swap = ((a - b) @ direction < 0)[:, None]
        chosen, rejected = torch.where(swap, b, a), torch.where(swap, a, b)
        ids = torch.arange(64)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = head.loss(chosen, rejected, None, ids)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert ((head.rewards(chosen) - head.rewards(rejected)).mean(1) > 0).float().mean() > 0.9

    def test_calibration_centres_and_scales_each_member(self, kind):
        head = built(kind)
        x = features(500)
        assert not bool(head.calibrated)
        head.calibrate(x)
        members = head(x).members
        torch.testing.assert_close(members.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(members.std(0), torch.ones(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(head(x).variance.mean(), head.reference_variance)
        assert bool(head.calibrated)

    def test_calibration_refuses_too_few_responses(self, kind):
        with pytest.raises(ValueError, match="at least 2"):
            built(kind).calibrate(features(1))

    def test_a_members_offset_changes_no_margin_variance(self, kind):
        head = built(kind)
        chosen, rejected = head.rewards(features(8, 1)), head.rewards(features(8, 2))
        offset = torch.tensor([100.0, -3.0, 0.5, 7.0])
        plain = margin_estimate(chosen.double(), rejected.double())
        moved = margin_estimate(chosen.double() + offset, rejected.double() + offset)
        torch.testing.assert_close(plain.variance, moved.variance)

    def test_init_args_build_the_same_head_again(self, kind):
        head = built(kind)
        again = build_head(f"{kind.__module__}.{kind.__qualname__}", head.init_args(), HIDDEN)
        again.load_state_dict(head.state_dict())
        torch.testing.assert_close(again(features()), head(features()))

    def test_a_saved_head_scores_equally(self, kind, tmp_path):
        head = built(kind)
        head.calibrate(features(100))
        RewardModel(FeatureSpec(Pretrained("base")), head, None).save_pretrained(tmp_path / "ensemble")
        loaded = RewardModel.from_pretrained(tmp_path / "ensemble", with_backbone=False)
        torch.testing.assert_close(loaded.head(features()), head(features()), atol=1e-5, rtol=0)
        assert not any(p.requires_grad for p in loaded.parameters())

    def test_the_mean_as_a_linear_function_agrees(self, kind):
        head = built(kind)
        head.calibrate(features(100))
        linear = head.linear_mean()
        if linear is None:
            pytest.skip("not linear")
        torch.testing.assert_close(features() @ linear[0] + linear[1], head(features()).mean, atol=1e-5, rtol=1e-5)

    def test_no_members_are_refused(self, kind):
        with pytest.raises(ValueError, match="expected at least 1, got 0"):
            kind(num_members=0)


def test_members_differ_and_do_not_depend_on_their_number():
    few, many = HeadEnsemble(3), HeadEnsemble(8)
    few.build(HIDDEN)
    many.build(HIDDEN)
    torch.testing.assert_close(few.weight, many.weight[:3])
    assert (few.weight[0] - few.weight[1]).abs().min() > 0


def test_initial_scale():
    head = HeadEnsemble(200)
    head.build(HIDDEN)
    # N(0, 1/√(H+1)): σ² = 1/17
    assert head.weight.var().item() == pytest.approx(1 / 17, rel=0.1)


def test_loss_sums_over_members():
    # Without bootstrap, the gradient of a member does not depend on how many others there are.
    gradients = []
    for count in (1, 5):
        head = HeadEnsemble(count, bootstrap=False)
        head.build(HIDDEN)
        head.loss(features(8, 1), features(8, 2), None, torch.arange(8)).backward()
        gradients.append(head.weight.grad[0])
    torch.testing.assert_close(*gradients)


def test_hidden_layer_is_a_loop_over_members():
    head = HeadEnsemble(4, hidden_width=5)
    head.build(HIDDEN)
    x = features(3)
    for k in range(4):
        hidden = torch.tanh(x @ head.hidden_weight[k].T + head.hidden_bias[k])
        torch.testing.assert_close(head.rewards(x)[:, k], hidden @ head.weight[k] + head.bias[k])


def test_another_class_in_a_folder_is_refused():
    with pytest.raises(ValueError, match="expected a subclass of RewardHead, got collections"):
        build_head("collections.OrderedDict", {}, HIDDEN)
