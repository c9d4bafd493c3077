"""Members as adapters: equal to plain peft, one pass below the adapted blocks, any base."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from lit_vapo.functional import nuclear_diversity, poisson_bootstrap
from lit_vapo.models.batching import right_pad
from lit_vapo.models.digests import seal
from lit_vapo.models.pretrained import (
    Pretrained,
    decoder_layers,
    freeze,
    hidden_size,
    load_backbone,
)
from lit_vapo.models.quantised import keep_differentiable
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.types import PairLabels, TokenSequence

CPU = torch.device("cpu")
SEQUENCES = [TokenSequence(list(range(5, 5 + n)), 2) for n in (4, 9, 3, 6)]
# Two pairs that the bootstrap gives to all three members.
IDS = [i for i in range(100) if (poisson_bootstrap(torch.tensor([i]), 3, seed=0) > 0).all()][:2]
LABELS = PairLabels(torch.zeros(2), torch.ones(2), torch.ones(2), torch.tensor(IDS))


def reward_model(model, members=3, quantization=None, spread=0.3, **kwargs):
    spec = FeatureSpec(Pretrained(model, quantization=quantization))
    head = LoraEnsemble(members, rank=4, **kwargs)
    head.build(hidden_size(spec.base))
    backbone = freeze(load_backbone(spec.base))
    keep_differentiable(backbone)
    backbone = head.attach(backbone, decoder_layers(backbone))
    for i, b in enumerate(head.lora_b.values()):  # zero at first: a member would be the backbone itself
        for k in range(members):  # from generators of their own, as in the class: member k does not depend on K
            b.data[k].normal_(0, spread, generator=torch.Generator().manual_seed(100 * i + k))
    return RewardModel(spec, head, backbone)


def tokens(count=4):
    ids, lengths = right_pad([s.ids for s in SEQUENCES[:count]])
    return ids, lengths, torch.full((count,), 2)


def loss(model):
    features = model.encode(*tokens())
    return model.head.loss(features[:2], features[2:], LABELS)


@pytest.mark.parametrize("top", [None, 1])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mistral", "gemma2", "phi3"])
def test_each_member_is_what_plain_peft_makes_of_its_folder(tmp_path, kind, top):
    sizes = {"head_dim": 16} if kind == "gemma2" else {}
    folder = tiny_model(tmp_path / "base", tiny_tokenizer(tmp_path / "base"), kind=kind, layers=3, **sizes)
    model = reward_model(folder, top_layers=top)
    scores = model.head.rewards(compute_features(model, SEQUENCES, CPU))
    assert scores.std(dim=1).min() > 0.01
    model.save_pretrained(tmp_path / "saved")
    for k in range(3):
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        member = PeftModel.from_pretrained(base, str(tmp_path / "saved" / f"member_{k}")).eval()
        for row, sequence in enumerate(SEQUENCES):
            with torch.no_grad():
                logit = member(input_ids=torch.tensor([sequence.ids])).logits[0, 0]
            torch.testing.assert_close(logit, scores[row, k], atol=1e-5, rtol=1e-5)


def test_a_member_trains_as_it_would_alone(tiny_model_dir):
    one, three = reward_model(tiny_model_dir, members=1), reward_model(tiny_model_dir, members=3)
    for model in (one, three):
        loss(model).backward()
    for key in one.head.lora_a:
        for a, b in ((one.head.lora_a, three.head.lora_a), (one.head.lora_b, three.head.lora_b)):
            torch.testing.assert_close(a[key].grad[0], b[key].grad[0], atol=1e-6, rtol=1e-4)
            assert b[key].grad[2].abs().max() > 0
    torch.testing.assert_close(one.head.weight.grad[0], three.head.weight.grad[0])


def many(pairs, seed=0, **kwargs):
    """Pairs of sequences of different lengths, chosen ones first, and their labels."""
    make = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (2 * pairs,), generator=make)
    ids = torch.randint(3, 60, (2 * pairs, 11), generator=make)
    ones = torch.ones(pairs)
    return (ids, lengths, torch.full((2 * pairs,), 2)), PairLabels(0 * ones, ones, ones, torch.arange(pairs), **kwargs)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_pairs_that_the_bootstrap_leaves_out_are_not_read(tmp_path, kind, checkpointing, pooling):
    sizes = {"head_dim": 16} if kind == "gemma2" else {}
    folder = tiny_model(tmp_path / "base", tiny_tokenizer(tmp_path / "base"), kind=kind, layers=3, **sizes)
    inputs, labels = many(8)
    found, rows = [], []
    for skips in (False, True):
        model = reward_model(folder, top_layers=2, centering=0.1)
        model.spec = FeatureSpec(Pretrained(folder, gradient_checkpointing=checkpointing), None, pooling)
        model.backbone.recomputes_blocks = checkpointing
        decoder_layers(model.backbone)[-1].register_forward_hook(lambda *args: rows.append(len(args[2])))
        with model.head.learning_from(labels) if skips else nullcontext():
            features = model.encode(*inputs)
        value = model.head.loss(features[:8], features[8:], labels)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.head.parameters())])
    counted = (poisson_bootstrap(labels.example_ids, 3, seed=0) > 0).sum(0)
    assert counted.unique().numel() > 1
    assert rows == [3 * 16, 3 * 2 * int(counted.max())]
    for whole, few in zip(*found, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(few, whole, atol=1e-6, rtol=1e-4)
    assert model.encode(*inputs).shape == (16, 3, 32)


@pytest.mark.parametrize(
    ("members", "weights"),
    [
        (2, [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]),  # as many rows as the batch has
        (3, [[1.0, 1.0, 0.0]] * 2 + [[0.0, 0.0, 0.0]] * 2),  # a member and two pairs that do not count
        (2, [[0.0, 0.0]] * 4),
        (2, [[1.0, 1.0]] * 4),
        (1, [[0.0], [1.0], [0.0], [1.0]]),
    ],
)
def test_whatever_pairs_count_the_loss_is_that_of_all_rows(tiny_model_dir, monkeypatch, members, weights):
    inputs, labels = many(4)
    monkeypatch.setattr(LoraEnsemble, "pair_weights", lambda *_: torch.tensor(weights))
    found = []
    for skips in (False, True):
        model = reward_model(tiny_model_dir, members=members)
        with model.head.learning_from(labels) if skips else nullcontext():
            features = model.encode(*inputs)
        value = model.head.loss(features[:4], features[4:], labels)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.head.parameters())])
    for whole, few in zip(*found, strict=True):
        torch.testing.assert_close(few, whole, atol=1e-6, rtol=1e-4)


def test_the_lower_blocks_run_once_for_all_members(tiny_model_dir):
    model = reward_model(tiny_model_dir, top_layers=1)
    rows = []
    for block in decoder_layers(model.backbone):
        block.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    model.encode(*tokens())
    assert rows == [4, 12]  # two blocks, three members


def test_adapters_are_off_outside_a_pass(tiny_model_dir):
    model = reward_model(tiny_model_dir)
    plain = load_backbone(Pretrained(tiny_model_dir)).eval()
    model.encode(*tokens())
    ids = tokens()[0][:1]
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(ids).last_hidden_state, plain(ids).last_hidden_state)


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_every_adapter_gets_a_gradient(tmp_path, quantization):
    folder = tiny_model(tmp_path / "m", tiny_tokenizer(tmp_path / "m"), hidden_size=128, intermediate_size=128)
    model = reward_model(folder, quantization=quantization)
    with torch.no_grad():
        model.encode(*tokens())  # a pass without a gradient before, as in a validation
    loss(model).backward()
    gradients = [p.grad for d in (model.head.lora_a, model.head.lora_b) for p in d.values()]
    assert len(gradients) == 2 * 2 * 7  # A and B of seven layers in two blocks
    assert all((g.flatten(1).abs().amax(1) > 0).all() for g in gradients)
    assert all(p.grad is None for p in model.backbone.parameters())


def test_a_member_learns_from_its_own_bootstrap(tiny_model_dir):
    # A pair that member 0 never sees and member 1 does.
    counts = poisson_bootstrap(torch.arange(1000), 3, seed=0)
    identity = int(((counts[:, 0] == 0) & (counts[:, 1] > 0)).nonzero()[0])
    model = reward_model(tiny_model_dir)
    features = model.encode(*tokens(2))
    pair = PairLabels(torch.zeros(1), torch.ones(1), torch.ones(1), torch.tensor([identity]))
    model.head.loss(features[:1], features[1:], pair).backward()
    for parameter in model.head.lora_a.values():
        assert parameter.grad[0].abs().max() == 0
        assert parameter.grad[1].abs().max() > 0


def test_diversity_is_taken_off_the_loss(tiny_model_dir):
    plain, diverse = reward_model(tiny_model_dir), reward_model(tiny_model_dir, diversity=0.5)
    expected = sum(nuclear_diversity(a) for a in diverse.head.lora_a.values()) / len(diverse.head.lora_a)
    torch.testing.assert_close(loss(plain) - loss(diverse), 0.5 * 3 * expected)


def test_only_named_layers_are_adapted(tiny_model_dir):
    head = reward_model(tiny_model_dir, target_modules=["q_proj", "v_proj"]).head
    assert {key.rpartition("/")[2] for key in head.lora_a} == {"q_proj", "v_proj"}
    assert len(head.lora_a) == 4
    for wrong in (["wq"], ["q_proj", "wq"], "wq"):
        with pytest.raises(ValueError, match=r"head.target_modules: expected each to be one of \['down_.*got \['wq'\]"):
            reward_model(tiny_model_dir, target_modules=wrong)
    with pytest.raises(ValueError, match=r"head.top_layers: expected 1 … 2, got 3"):
        reward_model(tiny_model_dir, top_layers=3)
    with pytest.raises(ValueError, match=r"rank: expected at least 1, got 0"):
        LoraEnsemble(rank=0)
    with pytest.raises(ValueError, match=r"alpha: expected a number above 0, got 0"):
        LoraEnsemble(alpha=0)
    with pytest.raises(ValueError, match=r"diversity: expected a number of 0 or more, got -1"):
        LoraEnsemble(diversity=-1)


@pytest.fixture
def saved(tiny_model_dir, tmp_path):
    """A saved ensemble of three members."""
    reward_model(tiny_model_dir).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_missing_member_is_named(saved):
    shutil.rmtree(saved / "member_1")
    seal(saved)
    with pytest.raises(ValueError, match=r"saved: expected member_1 among the files of digests.json, got none"):
        RewardModel.from_pretrained(saved)


def test_a_member_of_another_base_is_refused(saved):
    path = saved / "member_2" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "other/model"}))
    seal(saved)
    with pytest.raises(ValueError, match=r"member_2: expected an adapter of '.*', got one of 'other/model'"):
        RewardModel.from_pretrained(saved)


def test_a_member_of_another_shape_is_refused(saved, tiny_model_dir, tmp_path):
    wide = tiny_model(tmp_path / "w", tiny_tokenizer(tmp_path / "w"), hidden_size=64)
    reward_model(wide).save_pretrained(tmp_path / "wide")
    weights = "adapter_model.safetensors"
    shutil.copy(tmp_path / "wide" / "member_0" / weights, saved / "member_0" / weights)
    seal(saved)
    with pytest.raises(ValueError, match=r"member_0: expected rank .* and a head of width 32, got .*\(64,\)"):
        RewardModel.from_pretrained(saved)
    # Fewer layers.
    reward_model(
        json.loads((saved / "ensemble.json").read_text())["spec"]["base"]["path"], top_layers=1
    ).save_pretrained(tmp_path / "top")
    shutil.copy(tmp_path / "top" / "member_0" / weights, saved / "member_0" / weights)
    seal(saved)
    with pytest.raises(ValueError, match=r"member_0: expected adapters of 14 layers of this base, got 7"):
        RewardModel.from_pretrained(saved)
