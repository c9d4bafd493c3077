"""What reward heads read: never the end of a response, the layer that predicts best, wherever they are used."""

import helpers
import ppo_helpers
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_vapo.commands.export import export
from lit_vapo.data.collate import pair_labels
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.functional import held_out_nll
from lit_vapo.models.batching import right_pad
from lit_vapo.models.generation import Sampling, Shaping
from lit_vapo.models.pretrained import Pretrained, load_backbone
from lit_vapo.models.token_rows import TokenRows
from lit_vapo.models.trunk import content_lengths, length_mask, pool
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.members.full import FullEnsemble
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.reward_model import FeatureSpec, RewardModel
from lit_vapo.stages.reward import building as reward_building
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.types import FeaturePairs, TokenSequence

CPU = torch.device("cpu")
EOS, BOS = 0, 1
# Prompt and response without an end; the last has no response, the one before it an end in its prompt.
TEXTS = [([5, 6, 7], [8, 9, 10]), ([5], [11, 12, 13, 14, 15]), ([5, EOS, 7], [8]), ([5, 6], [])]
OPEN = [TokenSequence([*prompt, *response], len(prompt)) for prompt, response in TEXTS]
ENDED = [TokenSequence([*s.ids, end], s.prompt_length) for s, end in zip(OPEN, [EOS, BOS, EOS, EOS], strict=True)]


def data(model, file, **kwargs):
    return PreferenceDataModule(model, preferences=file, **{"validation_fraction": 0.3, "max_length": 64, **kwargs})


def test_what_is_read_is_all_but_the_end():
    ids, lengths = right_pad([[5, 6, 7, EOS], [5, EOS, 6], [5, 6, BOS], [5, 6, EOS], [EOS]])
    prompts = torch.tensor([1, 1, 1, 3, 0])
    # An end inside stays, as does one that a prompt ends with; one row of nothing but an end has to be read.
    assert content_lengths(ids, lengths, prompts, [EOS, BOS]).tolist() == [3, 3, 2, 3, 1]
    assert content_lengths(ids, lengths, prompts, []).tolist() == lengths.tolist()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_nothing_but_an_end_is_read_at_the_end_of_the_prompt(pooling):
    hidden = torch.randn(1, 4, 3)
    torch.testing.assert_close(pool(hidden, torch.tensor([3]), torch.tensor([3]), pooling), hidden[:, 2])


def models(folder):
    """One ensemble of each kind on a tiny model, with adapters and weights that matter."""
    for head in (HeadEnsemble(2), LoraEnsemble(2), FullEnsemble(2)):
        head.build(32)
        backbone = load_backbone(Pretrained(folder))
        backbone = head.attach(backbone, backbone.layers)
        for name, parameter in head.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(parameter)
        yield RewardModel(FeatureSpec(Pretrained(folder), ends=[EOS, BOS]), head, backbone).eval()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_end_changes_no_reward(tiny_model_dir, pooling):
    for model in models(tiny_model_dir):
        model.spec.pooling = pooling
        rewards = []
        for sequences in (OPEN, ENDED):
            prompts = torch.tensor([s.prompt_length for s in sequences])
            with torch.no_grad():
                at_once = model(*right_pad([s.ids for s in sequences]), prompts).members
                rewards += [at_once, model.head(compute_features(model, sequences, CPU)).members]
        for other in rewards[1:]:
            torch.testing.assert_close(other, rewards[0], atol=1e-5, rtol=1e-5)
        assert rewards[0].std() > 1e-3


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layer", [None, 1])
def test_an_end_changes_no_reward_in_ppo(tiny_model_dir, tmp_path, pooling, layer):
    reward = ppo_helpers.ensemble(tmp_path / "e", tiny_model_dir, layer=layer, pooling=pooling, ends=[EOS, BOS])
    networks = ppo_helpers.networks(tiny_model_dir, reward)
    assert networks.scorer.taps
    features = []
    # Rollouts have responses of one token or more.
    for sequences in (OPEN[:3], ENDED[:3]):
        ids, lengths = right_pad([s.ids for s in sequences])
        prompts = torch.tensor([s.prompt_length for s in sequences])
        rows = TokenRows(ids, prompts, length_mask(lengths - prompts, int((lengths - prompts).max())))
        features += networks.reference(rows, Shaping(), networks.scorer.taps).pooled
    torch.testing.assert_close(features[1], features[0], atol=1e-5, rtol=1e-5)


def test_training_and_calibration_read_no_end(tiny_model_dir, tiny_preferences_file, tmp_path):
    weights = []
    for append in (True, False):
        module = RewardModule(Pretrained(tiny_model_dir), HeadEnsemble(2))
        pairs = data(tiny_model_dir, tiny_preferences_file, append_eos=append)
        assert (pairs.preferences("train").chosen[0].ids[-1] == EOS) == append
        ppo_helpers.trainer(tmp_path / str(append), max_epochs=1).fit(module, pairs)
        assert module.spec.ends == [EOS]
        weights.append(module.head.weight.detach())
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-5)


def test_what_the_user_stops_at_is_an_end_too(tiny_model_dir, tiny_preferences_file, tmp_path):
    sampling = Sampling(4, stop_token_ids=[7])
    module = RewardModule(Pretrained(tiny_model_dir), HeadEnsemble(2), reference_sampling=sampling)
    ppo_helpers.trainer(tmp_path, max_epochs=1).fit(module, data(tiny_model_dir, tiny_preferences_file))
    assert module.spec.ends == [EOS, 7]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A tiny model of five blocks."""
    path = tmp_path_factory.mktemp("deep")
    return helpers.tiny_model(path, helpers.tiny_tokenizer(path), layers=5)


def fitted(model, pairs, folder, **kwargs):
    module = RewardModule(Pretrained(model), HeadEnsemble(2), **kwargs)
    keep = ModelCheckpoint(folder / "ckpt", save_last=True)
    ppo_helpers.trainer(folder, callbacks=[keep], enable_checkpointing=True, max_epochs=1).fit(module, pairs)
    return module, folder / "ckpt" / "last.ckpt"


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_the_layer_that_predicts_validation_pairs_best_is_read(
    deep, tiny_preferences_file, tmp_path, monkeypatch, capsys
):
    passes = []
    compute = reward_building.compute_layers
    monkeypatch.setattr(reward_building, "compute_layers", lambda *a: passes.append(a[3]) or compute(*a))
    pairs = data(deep, tiny_preferences_file)
    module, checkpoint = fitted(
        deep, pairs, tmp_path, reference=Pretrained(deep), num_reference=4, reference_sampling=Sampling(4)
    )
    # One pass for all of them over each split; the chosen one is read alone (validation cut in half, references).
    assert passes == [[2, 3, 4, None]] * 2 + [[module.spec.layer]] * 2
    assert module.backbone is None

    nlls = []
    for layer in (2, 3, 4, None):
        model = RewardModel(FeatureSpec(Pretrained(deep), layer, "mean", [EOS]), module.head, None)
        model.backbone = load_backbone(Pretrained(deep), layer)
        parts = []
        for split in ("train", "val"):
            sides = pairs.preferences(split)
            features = [compute_features(model, x, CPU) for x in (sides.chosen, sides.rejected)]
            parts.append(FeaturePairs(*features, pair_labels(pairs.preference_rows(split))))
        nlls.append(float(held_out_nll(*parts)))
    assert module.spec.layer == (2, 3, 4, None)[nlls.index(min(nlls))]
    assert f"layer: {module.spec.layer or 5}, by the NLL of the validation pairs" in capsys.readouterr().out

    # Whoever goes on from the checkpoint reads that layer, whatever his own pairs would say.
    monkeypatch.setattr(reward_building, "held_out_nll", lambda *a: pytest.fail("chosen again"))
    other = RewardModule(Pretrained(deep), HeadEnsemble(2))
    tester = ppo_helpers.trainer(tmp_path / "b")
    tester.test(other, datamodule=pairs, ckpt_path=checkpoint, verbose=False, weights_only=True)
    assert other.spec == module.spec
    export(str(checkpoint), str(tmp_path / "exported"))
    assert RewardModel.from_pretrained(tmp_path / "exported").spec == module.spec


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_heads_on_another_layer_than_the_checkpoint_s_are_refused(deep, tiny_preferences_file, tmp_path):
    pairs = data(deep, tiny_preferences_file)
    _, checkpoint = fitted(deep, pairs, tmp_path, layer=2)
    other = RewardModule(Pretrained(deep), HeadEnsemble(2), layer=3)
    with pytest.raises(ValueError, match=r"expected heads that read .*'layer': 3.*, got some that read .*'layer': 2"):
        ppo_helpers.trainer(tmp_path / "b").test(other, datamodule=pairs, ckpt_path=checkpoint, weights_only=True)


@pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero")
@pytest.mark.parametrize("head", [HeadEnsemble(2), LoraEnsemble(2)])
def test_without_a_choice_the_last_layer_is_read(deep, tiny_preferences_file, tmp_path, capsys, head):
    fraction = 0.0 if isinstance(head, HeadEnsemble) else 0.3
    module = RewardModule(Pretrained(deep), head)
    ppo_helpers.trainer(tmp_path, max_epochs=1).fit(
        module, data(deep, tiny_preferences_file, validation_fraction=fraction)
    )
    assert module.spec.layer is None
    assert ("layer: the last of 5, since there are no validation pairs" in capsys.readouterr().out) == (fraction == 0)
