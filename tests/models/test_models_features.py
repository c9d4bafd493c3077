"""Features: batched by length, cached by what they depend on, checked; and reward models on disk."""

import itertools
import json
import os

import helpers
import ppo_helpers
import pytest
import torch

from lit_vapo.models.batching import PASS_ON_CPU, length_batches, right_pad
from lit_vapo.models.pretrained import Pretrained, decoder_layers, hidden_size, load_backbone
from lit_vapo.models.trunk import last_rows_only, pool, run_layers, run_trunk
from lit_vapo.rewards.features import compute_features, feature_key, load_features, save_features
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.types import TokenSequence

CPU = torch.device("cpu")
SEQUENCES = [TokenSequence(list(range(5, 5 + n)), p) for n, p in ((4, 1), (9, 3), (2, 1), (6, 2), (30, 10))]


def bare(spec, backbone):
    """A reward model whose head is of no interest."""
    return RewardModel(spec, HeadEnsemble(2), backbone)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_hold_each_row_once_within_the_budget(device):
    lengths = torch.randint(1, 50, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = length_batches(lengths, torch.device(device), 120)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert all(len(b) * max(lengths[i] for i in b) <= 120 for b in batches)
    if device == "cuda":
        # Each batch is as full as its next row allows.
        for b, following in itertools.pairwise(batches):
            assert (len(b) + 1) * lengths[following[0]] > 120
    assert length_batches([500], torch.device(device), 120) == [[0]]
    assert length_batches([], torch.device(device), 120) == []


def spent(lengths, batches):
    """What batches take of a processor."""
    return sum(len(b) * max(lengths[i] for i in b) + PASS_ON_CPU for b in batches)


def test_a_processor_is_given_what_takes_least_of_it():
    # Twenty tokens of padding are cheaper than another pass, and two hundred are not.
    assert length_batches([10, 30], CPU) == [[0, 1]]
    assert length_batches([100, 10, 100, 10, 10], CPU) == [[1, 3, 4], [0, 2]]
    # No other way to cut the rows is cheaper: all of them were tried.
    lengths = torch.randint(1, 80, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    order = sorted(range(9), key=lambda i: (lengths[i], i))
    cuts = [[0, *c, 9] for n in range(9) for c in itertools.combinations(range(1, 9), n)]
    ways = [[order[i:j] for i, j in itertools.pairwise(cut)] for cut in cuts]
    fitting = [w for w in ways if all(len(b) * lengths[b[-1]] <= 200 for b in w)]
    found = length_batches(lengths, CPU, 200)
    assert 1 < len(found) < 9
    assert spent(lengths, found) == min(spent(lengths, way) for way in fitting)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("tokens", [1, 20, 4096])
def test_features_do_not_depend_on_batching(tiny_model_dir, monkeypatch, pooling, tokens):
    monkeypatch.setattr("lit_vapo.models.batching.TOKENS_ON_CPU", tokens)
    spec = FeatureSpec(Pretrained(tiny_model_dir), 1, pooling)
    backbone = load_backbone(spec.base, spec.layer)
    features = compute_features(bare(spec, backbone), SEQUENCES, CPU)
    for row, sequence in enumerate(SEQUENCES):
        ids, lengths = right_pad([sequence.ids])
        with torch.no_grad():
            hidden = run_trunk(backbone, ids, lengths).last
        alone = pool(hidden, lengths, torch.tensor([sequence.prompt_length]), pooling)
        torch.testing.assert_close(features[row], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "falcon"])
def test_a_pass_ends_with_the_last_block_that_is_read(tmp_path, kind):
    sizes = {"gemma2": {"head_dim": 16}}.get(kind, {})
    folder = helpers.tiny_model(tmp_path / "m", helpers.tiny_tokenizer(tmp_path / "t"), kind, layers=3, **sizes)
    backbone = load_backbone(Pretrained(folder))
    ids, lengths = right_pad([s.ids for s in SEQUENCES])
    computed = []
    for i, block in enumerate(decoder_layers(backbone), start=1):
        block.mlp.register_forward_hook(lambda *_, i=i: computed.append(i))
    with torch.no_grad():
        last, first, second = run_layers(backbone, ids, lengths, [None, 1, 2])
        assert computed == [1, 2, 3]
        for layers, expected, depth in (([1], [first], 1), ([2, 1], [second, first], 2), ([3, 1], [last, first], 3)):
            computed.clear()
            assert all(map(torch.equal, run_layers(backbone, ids, lengths, layers), expected))
            assert computed == list(range(1, depth + 1))
        # Nothing is left behind.
        assert torch.equal(run_layers(backbone, ids, lengths, [None])[0], last)


def test_the_key_changes_with_everything_the_features_depend_on(tiny_model_dir):
    base = Pretrained(tiny_model_dir)
    spec = FeatureSpec(base)
    other = [TokenSequence([5, 6, 7, 9], 1), *SEQUENCES[1:]]
    longer_prompt = [SEQUENCES[0]._replace(prompt_length=2), *SEQUENCES[1:]]
    keys = [
        feature_key(spec, SEQUENCES),
        feature_key(FeatureSpec(base, 1), SEQUENCES),
        feature_key(FeatureSpec(base, pooling="mean"), SEQUENCES),
        feature_key(FeatureSpec(Pretrained(tiny_model_dir, dtype="bfloat16")), SEQUENCES),
        feature_key(FeatureSpec(Pretrained(tiny_model_dir, quantization="8bit")), SEQUENCES),
        feature_key(spec, other),
        feature_key(spec, longer_prompt),
        feature_key(spec, SEQUENCES[::-1]),
        feature_key(spec, SEQUENCES[:-1]),
    ]
    assert len(set(keys)) == len(keys)
    assert feature_key(FeatureSpec(Pretrained(tiny_model_dir)), list(SEQUENCES)) == keys[0]


def test_the_key_changes_with_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_text("a")
    spec = FeatureSpec(Pretrained(str(tmp_path)))
    before = feature_key(spec, SEQUENCES)
    os.utime(weights, ns=(1, 1))
    assert feature_key(spec, SEQUENCES) != before


def test_the_cache_gives_back_what_it_got(tmp_path):
    features = torch.randn(3, 4)
    assert load_features(tmp_path / "new", "key") is None
    save_features(tmp_path / "new", "key", features)
    assert torch.equal(load_features(tmp_path / "new", "key"), features)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["key.safetensors"]


def test_features_that_are_not_finite_name_the_sequence(tiny_model_dir):
    spec = FeatureSpec(Pretrained(tiny_model_dir))
    backbone = load_backbone(spec.base)
    # Token 13 occurs in the second and the last sequence only.
    backbone.get_input_embeddings().weight.data[13] = float("nan")
    with pytest.raises(ValueError, match=r"expected finite features, got NaN or infinity for sequence 1"):
        compute_features(bare(spec, backbone), SEQUENCES, CPU)
    with pytest.raises(ValueError, match=r"expected at least one sequence, got none"):
        compute_features(bare(spec, backbone), [], CPU)


@pytest.mark.parametrize("own_backbone", [False, True])
@pytest.mark.parametrize("layer", [None, 1])
def test_a_saved_reward_model_scores_equally(tiny_model_dir, tmp_path, own_backbone, layer):
    head = HeadEnsemble(4, hidden_width=8)
    spec = FeatureSpec(Pretrained(tiny_model_dir), layer, "mean")
    head.build(hidden_size(spec.base))
    head.calibrate(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    model = RewardModel(spec, head, load_backbone(spec.base, layer))
    if own_backbone:
        for parameter in model.backbone.parameters():
            parameter.data.mul_(1.1)
    model.save_pretrained(tmp_path / "saved", save_backbone=own_backbone)
    loaded = RewardModel.from_pretrained(tmp_path / "saved")
    ids, lengths = right_pad([s.ids for s in SEQUENCES])
    prompts = torch.tensor([s.prompt_length for s in SEQUENCES])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, lengths, prompts), model(ids, lengths, prompts), atol=1e-5, rtol=1e-5)
    assert not loaded.training
    with pytest.raises(FileExistsError, match=r"expected a folder without an ensemble"):
        model.save_pretrained(tmp_path / "saved")


def test_folders_that_hold_no_ensemble_are_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"reward: expected a folder with ensemble.json"):
        RewardModel.from_pretrained(tmp_path)
    folder = ppo_helpers.ensemble(tmp_path / "e", tiny_model_dir)
    path = tmp_path / "e" / "ensemble.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match=r"format_version: expected 3, got 99"):
        RewardModel.from_pretrained(folder)


def test_without_its_backbone_a_reward_model_wants_features(tiny_model_dir, tmp_path):
    folder = ppo_helpers.ensemble(tmp_path / "e", tiny_model_dir)
    model = RewardModel.from_pretrained(folder, with_backbone=False)
    ids, lengths = right_pad([[1, 2]])
    with pytest.raises(ValueError, match=r"expected features, got token ids"):
        model(ids, lengths, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"save_backbone: expected a reward model with a backbone"):
        model.save_pretrained(tmp_path / "f", save_backbone=True)


@pytest.mark.parametrize("copies", [1, 3])
def test_last_rows_are_enough_for_last_pooling(tiny_model_dir, copies):
    backbone = load_backbone(Pretrained(tiny_model_dir))
    ids, lengths = right_pad([s.ids for s in SEQUENCES])
    many = (ids.repeat(copies, 1), lengths.repeat(copies))
    with torch.no_grad():
        expected = run_trunk(backbone, *many).last
        with last_rows_only(backbone, lengths):
            found = run_trunk(backbone, *many).last
    rows = torch.arange(len(many[1]))
    torch.testing.assert_close(found[rows, many[1] - 1], expected[rows, many[1] - 1], atol=1e-5, rtol=1e-5)
    # The work of the other positions was left out.
    assert not torch.allclose(found[rows, 0], expected[rows, 0])
