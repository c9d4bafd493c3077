"""Every estimator on pooled features passes this suite; a new file under lit_vapo/uncertainty/ is found unasked."""

import inspect

import pytest
import torch
from helpers import concrete_subclasses, tiny_model, tiny_tokenizer

import lit_vapo.rewards.members
from lit_vapo.models.pretrained import Pretrained, decoder_layers, freeze, hidden_size, load_backbone
from lit_vapo.models.settings import Component
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel, build_head
from lit_vapo.types import FeaturePairs, PairLabels, TokenSequence

HIDDEN = 16
CPU = torch.device("cpu")


HEADS = concrete_subclasses(lit_vapo.rewards.members, RewardHead)
SEQUENCES = [TokenSequence(list(range(5, 5 + n)), p) for n, p in ((4, 1), (9, 3), (2, 1), (6, 2), (30, 10), (7, 3))]


def built(kind, members=4, **kwargs):
    head = kind(num_members=members, **kwargs)
    head.build(HIDDEN)
    return head


def features(head, batch=32, seed=0):
    """Features as a backbone would give them: one vector a row, or one a member."""
    x = torch.randn(batch, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return x if head.shares_features else x[:, None].expand(-1, head.num_members, -1)


def labels(count, **kwargs):
    columns = {
        "margin": torch.zeros(count),
        "probability": torch.ones(count),
        "weight": torch.ones(count),
        "example_ids": torch.arange(count),
    }
    return PairLabels(**{**columns, **kwargs})


def planted(head, count=64):
    """Pairs ordered by a hidden direction."""
    direction = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(9))
    a, b = features(head, count, 1), features(head, count, 2)
    swap = ((a - b) @ direction < 0)[..., None]
    return torch.where(swap, b, a), torch.where(swap, a, b)


def trained(head, steps=60):
    """The head after training on planted pairs, and its losses."""
    torch.manual_seed(0)
    chosen, rejected = planted(head)
    pairs = FeaturePairs(chosen, rejected, labels(64))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = head.loss(*pairs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    head.settle([pairs])
    return head, losses


def whole(kind, model, quantization=None):
    """A reward model whose parameters are not those it was made with, on the tiny model."""
    spec = FeatureSpec(Pretrained(model, quantization=quantization))
    head = kind(num_members=3)
    head.build(hidden_size(spec.base))
    backbone = freeze(load_backbone(spec.base))
    reward = RewardModel(spec, head, head.attach(backbone, decoder_layers(backbone)))
    generator = torch.Generator().manual_seed(0)
    for parameter in [*head.parameters(), *(p for p in reward.parameters() if p.requires_grad)]:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if head.settles:
        x = compute_features(reward, SEQUENCES, CPU)
        head.settle([FeaturePairs(x[:3], x[3:], labels(3))])
    head.calibrate(compute_features(reward, SEQUENCES, CPU))
    return reward.eval()


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory):
    """Folder of a Llama that is wide enough for the blocks of 4-bit weights."""
    path = tmp_path_factory.mktemp("wide") / "model"
    return tiny_model(path, tiny_tokenizer(path), hidden_size=128, intermediate_size=128)


def test_estimators_are_discovered():
    assert {k.__name__ for k in HEADS} >= {
        "HeadEnsemble",
        "LoraEnsemble",
        "FullEnsemble",
        "BayesianLinear",
        "McDropout",
        "AleatoricEnsemble",
    }


@pytest.mark.parametrize("kind", HEADS)
class TestEveryHead:
    def test_estimate_has_the_promised_shapes(self, kind):
        head = built(kind)
        for estimate in (head(features(head)), head.margin(features(head, seed=1), features(head, seed=2))):
            assert estimate.mean.shape == estimate.variance.shape == (32,)
            assert (estimate.variance > 0).all()
            assert estimate.members is None or estimate.members.shape == (32, 4)

    def test_half_precision_features_are_scored_in_float32(self, kind):
        head = built(kind)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert head(features(head).bfloat16()).mean.dtype == torch.float32
            assert head.training_rewards(features(head).bfloat16(), torch.arange(16)).dtype == torch.float32

    def test_scores_are_reproducible(self, kind):
        head = built(kind)
        torch.testing.assert_close(head(features(head)), head(features(head)), atol=0, rtol=0)

    def test_training_lowers_the_loss_and_orders_the_pairs(self, kind):
        head, losses = trained(built(kind))
        assert losses[-1] < 0.5 * losses[0]
        assert (head.margin(*planted(head)).mean > 0).float().mean() > 0.9

    def test_a_weight_of_n_is_n_repetitions(self, kind):
        # Of the loss's sum over pairs: it is divided by their number.
        head = built(kind)
        chosen, rejected = planted(head, 6)
        weighted = labels(6, weight=torch.tensor([1.0, 3.0, 0.0, 2.0, 1.0, 1.0]))
        index = torch.tensor([0, 1, 1, 1, 3, 3, 4, 5])
        repeated = labels(6).select(index)
        losses = []
        for pairs in ((chosen, rejected, weighted), (chosen[index], rejected[index], repeated)):
            # What is drawn follows from the seed and the pair, and not from its place in the batch.
            torch.manual_seed(0)
            losses.append(head.loss(*pairs) * len(pairs[0]))
        torch.testing.assert_close(*losses)
        states = []
        for pairs in (
            FeaturePairs(chosen, rejected, weighted),
            FeaturePairs(chosen[index], rejected[index], repeated),
        ):
            head.settle([pairs])
            states.append(head.margin(chosen, rejected))
        torch.testing.assert_close(*states, atol=1e-4, rtol=1e-4)

    def test_a_stated_margin_asks_for_more(self, kind):
        head = built(kind)
        chosen, rejected = planted(head)
        losses = []
        for margin in (0.0, 2.0):
            torch.manual_seed(0)
            losses.append(head.loss(chosen, rejected, labels(64, margin=torch.full((64,), margin))).item())
        assert losses[1] > losses[0] + 0.1

    def test_a_tie_pulls_towards_no_margin(self, kind):
        head = built(kind, bootstrap=False) if "bootstrap" in inspect.signature(kind).parameters else built(kind)
        chosen, rejected = planted(head)
        tie = labels(64, probability=torch.full((64,), 0.5))
        torch.manual_seed(0)
        forwards = head.loss(chosen, rejected, tie)
        torch.manual_seed(0)
        torch.testing.assert_close(forwards, head.loss(rejected, chosen, tie))

    def test_calibration_centres_and_scales_each_member(self, kind):
        head, _ = trained(built(kind))
        x = features(head, 500)
        assert not bool(head.calibrated)
        head.calibrate(x)
        estimate = head(x)
        torch.testing.assert_close(estimate.members.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(estimate.mean.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
        # One unit for each member, or one for all.
        units = torch.stack([*estimate.members.std(0), estimate.mean.std()])
        assert (units[:-1] - 1).abs().max() < 1e-5 or abs(units[-1] - 1) < 1e-5
        torch.testing.assert_close(estimate.variance.mean(), head.reference_variance)
        assert bool(head.calibrated)

    def test_moderation_moves_variances_to_the_typical_one_and_nothing_else(self, kind):
        if "moderated" not in inspect.signature(kind).parameters:
            pytest.skip("its variance is no estimate from members")
        plain, _ = trained(built(kind, moderated=False))
        moderated, _ = trained(built(kind, moderated=True))
        x = features(plain, 500)
        for head in (plain, moderated):
            head.calibrate(x)
        share, typical = moderated.shrinkage, moderated.typical_variance
        assert plain.shrinkage == 0 < share <= 1
        one, other = plain(x), moderated(x)
        torch.testing.assert_close((other.mean, other.members), (one.mean, one.members), atol=0, rtol=0)
        torch.testing.assert_close(other.variance - typical, (1 - share) * (one.variance - typical))
        torch.testing.assert_close(other.variance.mean(), moderated.reference_variance)
        # Anew, from variances as they come.
        moderated.calibrate(x)
        torch.testing.assert_close((moderated.shrinkage, moderated.typical_variance), (share, typical))

    def test_calibration_refuses_too_few_responses(self, kind):
        head = built(kind)
        with pytest.raises(ValueError, match="at least 2"):
            head.calibrate(features(head, 1))

    def test_what_members_add_to_both_responses_changes_no_margin(self, kind, monkeypatch):
        head, _ = trained(built(kind))
        chosen, rejected = planted(head)
        plain = head.margin(chosen, rejected)
        offset = torch.tensor([64.0, -32.0, 0.5, 8.0])
        rewards = kind.rewards
        monkeypatch.setattr(kind, "rewards", lambda self, x: rewards(self, x).double() + offset.double())
        moved = head.margin(chosen, rejected)
        torch.testing.assert_close(plain.mean, moved.mean.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(plain.variance, moved.variance.float(), atol=1e-5, rtol=1e-5)

    def test_init_args_build_the_same_head_again(self, kind):
        head, _ = trained(built(kind), steps=2)
        name = f"{kind.__module__}.{kind.__qualname__}"
        again = build_head(Component(class_path=name, init_args=head.init_args()), HIDDEN)
        again.load_state_dict(head.state_dict())
        torch.testing.assert_close(again(features(again)), head(features(head)))

    @pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
    def test_a_saved_model_scores_equally(self, kind, quantization, wide_model_dir, tmp_path):
        if kind.owns_backbones and quantization:
            pytest.skip("quantised weights are not trained")
        reward = whole(kind, wide_model_dir, quantization)
        reward.save_pretrained(tmp_path / "saved")
        again = RewardModel.from_pretrained(tmp_path / "saved")
        assert not any(p.requires_grad for p in again.parameters())
        with torch.no_grad():
            one, other = (m.head(compute_features(m, SEQUENCES, CPU)) for m in (reward, again))
        assert one.variance.max() > 0.01
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)

    def test_the_mean_as_a_linear_function_agrees(self, kind):
        head, _ = trained(built(kind))
        head.calibrate(features(head, 100))
        linear = head.linear_mean()
        if linear is None:
            pytest.skip("not linear")
        x = features(head)
        torch.testing.assert_close(x @ linear[0] + linear[1], head(x).mean, atol=1e-5, rtol=1e-5)

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
        head.loss(features(head, 8, 1), features(head, 8, 2), labels(8)).backward()
        gradients.append(head.weight.grad[0])
    torch.testing.assert_close(*gradients)


def test_hidden_layer_is_a_loop_over_members():
    head = HeadEnsemble(4, hidden_width=5)
    head.build(HIDDEN)
    x = features(head, 3)
    for k in range(4):
        hidden = torch.tanh(x @ head.hidden_weight[k].T + head.hidden_bias[k])
        torch.testing.assert_close(head.rewards(x)[:, k], hidden @ head.weight[k] + head.bias[k])


def test_another_class_in_a_folder_is_refused():
    with pytest.raises(ValueError, match="expected a subclass of RewardHead, got collections"):
        build_head(Component(class_path="collections.OrderedDict"), HIDDEN)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_begins_on_the_cpu_wherever_models_are_built(kind):
    head = built(kind)
    # Lightning builds models within such a block. Without a GPU nothing can begin there, and with one nothing may.
    with torch.device("cuda:0"):
        other = built(kind)
    for name, value in head.state_dict().items():
        assert other.state_dict()[name].device == CPU
        assert torch.equal(other.state_dict()[name], value), name
    # Who asks for shapes alone gets no more.
    with torch.device("meta"):
        assert {parameter.device.type for parameter in built(kind).state_dict().values()} == {"meta"}
