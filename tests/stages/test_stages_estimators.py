"""Every estimator through the commands: train, test, export, load, and serve PPO; members trained one by one."""

import csv
import json
import shutil

import helpers
import ppo_helpers
import pytest
import torch
import yaml
from helpers import last
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_vapo.cli import main
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.models.digests import seal
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.rewards.classifier import save_classifier
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.members.bayesian import BayesianLinear
from lit_vapo.rewards.members.full import FullEnsemble
from lit_vapo.rewards.members.heads import HeadEnsemble
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.types import TokenSequence

CPU = torch.device("cpu")
ESTIMATORS = sorted(f.stem for f in (helpers.CONFIGS / "estimator").glob("*.yaml"))
SEQUENCES = [TokenSequence(list(range(5, 5 + n)), 2) for n in (4, 9, 3, 6)]


def head_options(name):
    """The class of a file under configs/estimator/ with three members, for a model of two blocks."""
    kind = yaml.safe_load((helpers.CONFIGS / "estimator" / f"{name}.yaml").read_text())["model"]["head"]["class_path"]
    return [f"--model.head={kind}", "--model.head.num_members=3"]


def scores(folder):
    model = RewardModel.from_pretrained(folder)
    return model.head(compute_features(model, SEQUENCES, CPU))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, stage_args, tiny_model_dir):
    """Train an estimator by the command line, once; its run's folder."""
    made = {}

    def call(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            reference = ["--model.reference_sampling.max_new_tokens=6", "--model.num_reference=8"]
            options = [*head_options(name), f"--model.reference.path={tiny_model_dir}", *reference]
            main(stage_args("reward", "fit", folder, *options, "--data.test_fraction=0.3"))
            made[name] = folder
        return made[name]

    return call


@pytest.mark.parametrize("name", ESTIMATORS)
class TestEveryEstimator:
    def test_trains_tests_and_exports(self, name, trained, stage_args, tmp_path):
        folder = trained(name)
        options = [*head_options(name), "--data.test_fraction=0.3"]
        main(stage_args("reward", "test", folder, *options, ckpt_path=last(folder)))
        found = json.loads((folder / "test" / "evaluation.json").read_text())
        assert len(found["members"]) == 3
        assert found["uncertainty"]["margin_sigma"] > 0
        assert {"temperature", "nll_calibrated"} <= set(found["temperature"])
        for picture in ("reliability", "risk_coverage", "sigma"):
            assert (folder / "test" / f"{picture}.png").stat().st_size > 5000
        main(["export", f"--checkpoint={last(folder)}", f"--output={tmp_path / 'out'}"])
        estimate = scores(tmp_path / "out")
        # Calibrated on responses of the tiny model: finite, and in units of their spread.
        assert torch.isfinite(estimate.mean).all()
        assert (estimate.variance > 0).all()

    def test_the_folder_scores_as_the_run_did(self, name, trained, tmp_path):
        folder = trained(name)
        main(["export", f"--checkpoint={last(folder)}", f"--output={tmp_path / 'out'}"])
        module = RewardModule.load_from_checkpoint(last(folder), map_location="cpu", weights_only=True)
        if module.backbone is None:
            module.backbone = RewardModel.from_pretrained(tmp_path / "out").backbone
        with torch.no_grad():
            expected = module.head(compute_features(module.reward_model(), SEQUENCES, CPU))
        torch.testing.assert_close(scores(tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)

    def test_serves_ppo(self, name, trained, stage_args, tmp_path):
        main(["export", f"--checkpoint={last(trained(name))}", f"--output={tmp_path / 'out'}"])
        main(stage_args("ppo", "fit", tmp_path / "ppo", model__reward=tmp_path / "out"))
        with next((tmp_path / "ppo").glob("logs/version_*/metrics.csv")).open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/ensemble_sigma")]
        assert len(rows) == 2
        assert all(float(row["train/ensemble_sigma"]) > 0 for row in rows)


# Members trained one by one.


def full_run(model, data, folder, member=None):
    torch.manual_seed(0)
    pairs = PreferenceDataModule(model, preferences=data, validation_fraction=0.3, max_length=64, batch_size=4)
    head = FullEnsemble(2)
    module = RewardModule(
        Pretrained(model),
        head,
        learning_rate=1e-2,
        backbone_learning_rate=1e-3,
        reference=Pretrained(model),
        num_reference=8,
        member=member,
    )
    trainer = ppo_helpers.trainer(folder, max_epochs=2)
    trainer.fit(module, pairs)
    trainer.save_checkpoint(folder / "last.ckpt")
    main(["export", f"--checkpoint={folder / 'last.ckpt'}", f"--output={folder / 'out'}"])
    return folder / "out"


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_model_dir, tiny_preferences_file):
    """An ensemble trained in one run, and its members trained in two runs."""
    root = tmp_path_factory.mktemp("full")
    joint = full_run(tiny_model_dir, tiny_preferences_file, root / "joint")
    members = [full_run(tiny_model_dir, tiny_preferences_file, root / f"m{k}", member=k) for k in range(2)]
    return joint, members


def test_members_trained_alone_and_joined_are_those_trained_together(full, tmp_path, capsys):
    joint, members = full
    main(["reward", "join", f"--members=[{members[1]},{members[0]}]", f"--output={tmp_path / 'joined'}"])
    assert "joined 2 members" in capsys.readouterr().out
    got, expected = scores(tmp_path / "joined"), scores(joint)
    for found, wanted in ((got.mean, expected.mean), (got.members, expected.members)):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    # Not moderated before that either.
    torch.testing.assert_close(got.variance, expected.members.var(1), atol=1e-5, rtol=1e-4)
    # Their typical variance is not known before they are calibrated together: PPO then does it.
    assert bool(RewardModel.from_pretrained(joint).head.calibrated)
    assert not bool(RewardModel.from_pretrained(tmp_path / "joined").head.calibrated)
    # Training moved the backbones, each its own way.
    loaded = RewardModel.from_pretrained(joint).backbone
    first, second = (dict(m.named_parameters())["layers.0.mlp.up_proj.weight"] for m in loaded)
    assert not torch.equal(first, second)


def test_members_read_from_disk_score_as_those_held(full, tmp_path):
    joint, _ = full
    path = joint / "ensemble.json"
    held, before = scores(joint), path.read_text()
    try:
        config = json.loads(before)
        config["head"]["init_args"]["resident"] = False
        path.write_text(json.dumps(config))
        seal(joint)
        model = RewardModel.from_pretrained(joint)
        assert sum(p.numel() for p in model.parameters()) == model.head.weight.numel()
        torch.testing.assert_close(model.head(compute_features(model, SEQUENCES, CPU)), held)
    finally:
        path.write_text(before)
        seal(joint)


def test_what_cannot_be_joined_is_named(full, tmp_path, tiny_ensemble_dir):
    _, (first, second) = full
    output = f"--output={tmp_path / 'x'}"
    shutil.copytree(second, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "member_1")
    for members, message in (
        (f"[{first}]", r"--members: expected at least 2 folders, got 1"),
        (f"[{first},{first}]", r"expected each member once, got member 0 here and in"),
        (f"[{first},{tiny_ensemble_dir}]", r"expected (spec|head) as in .*, got"),
        (f"[{first},{tmp_path / 'none'}]", r"reward: expected a folder with ensemble.json"),
        (f"[{first},{tmp_path / 'bare'}]", r"bare: expected the model of member 1 in member_1, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["reward", "join", f"--members={members}", output])
    with pytest.raises(ValueError, match=r"expected all 2 members, got member \[1\] alone. Join"):
        RewardModel.from_pretrained(second)
    assert [p.name for p in tmp_path.iterdir()] == ["bare"]


def test_a_joined_member_that_is_missing_is_named(full, tmp_path):
    shutil.copytree(full[0], tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "member_1")
    with pytest.raises(ValueError, match=r"expected the model of member 1 in .*member_1, got none"):
        RewardModel.from_pretrained(tmp_path / "broken")


def test_only_members_that_share_nothing_train_alone(tiny_model_dir):
    base = Pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match=r"model.member: expected null for LoraEnsemble, whose members share"):
        RewardModule(base, LoraEnsemble(), member=0)
    with pytest.raises(ValueError, match=r"model.member: expected 0 … 3, got 4"):
        RewardModule(base, FullEnsemble(4), member=4)
    with pytest.raises(ValueError, match=r"model.freeze_backbone: expected true for FullEnsemble"):
        RewardModule(base, FullEnsemble(4), freeze_backbone=False)
    with pytest.raises(ValueError, match=r"model.base.quantization: expected null where .* are trained, got 4bit"):
        RewardModule(Pretrained(tiny_model_dir, quantization="4bit"), FullEnsemble(2))


# A finished ensemble.


def test_calibrate_writes_a_new_folder(tiny_ensemble_dir, tiny_model_dir, tiny_prompts_file, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in tiny_ensemble_dir.iterdir()}
    words = [
        "reward",
        "calibrate",
        f"--ensemble={tiny_ensemble_dir}",
        f"--output={tmp_path / 'new'}",
        f"--reference.path={tiny_model_dir}",
        f"--data.tokenizer={tiny_model_dir}",
        f"--data.prompts={tiny_prompts_file}",
        "--sampling.max_new_tokens=5",
        "--num_reference=12",
    ]
    main(words)
    assert "calibrated on 12 responses" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in tiny_ensemble_dir.iterdir()} == before
    old, new = (RewardModel.from_pretrained(f).head for f in (tiny_ensemble_dir, tmp_path / "new"))
    torch.testing.assert_close(old.weight, new.weight)
    assert (old.reward_loc != new.reward_loc).all()
    assert (old.reward_scale != new.reward_scale).all()
    with pytest.raises(FileExistsError, match=r"--output: expected a new or empty folder"):
        main(words)


def test_disagreement_draws_members_and_sigma(tiny_model_dir, tiny_preferences_file, tmp_path):
    # Its variances are as they come.
    ensemble = ppo_helpers.ensemble(tmp_path / "ensemble", tiny_model_dir)
    words = [
        "reward",
        "disagreement",
        f"--ensemble={ensemble}",
        f"--data.tokenizer={tiny_model_dir}",
        f"--data.preferences={tiny_preferences_file}",
        "--data.max_length=64",
        "--split=train",
    ]
    main([*words, f"--output={tmp_path / 'a'}"])
    found = json.loads((tmp_path / "a" / "disagreement.json").read_text())
    with (tmp_path / "a" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert found["num_responses"] == len(rows) == 2 * len({r["place"] for r in rows})
    sigma = [float(r["sigma"]) for r in rows]
    assert found["sigma_mean"] == pytest.approx(sum(sigma) / len(sigma), rel=1e-4)
    members = torch.tensor([[float(r[f"member_{k}"]) for k in range(3)] for r in rows])
    torch.testing.assert_close(members.std(1), torch.tensor(sigma), rtol=1e-3, atol=1e-4)
    # Four pairs with a small and four with a large σ.
    pair_sigma = torch.tensor(sigma).view(2, -1).mean(0)
    assert found["pairs"][0] == int(pair_sigma.argmin())
    assert found["pairs"][-1] == int(pair_sigma.argmax())
    for name in ("members.png", "sigma.png"):
        assert (tmp_path / "a" / name).stat().st_size > 5000
    with pytest.raises(ValueError, match=r"--pairs: expected numbers 0 … \d+, got 99"):
        main([*words, f"--output={tmp_path / 'b'}", "--pairs=[99]"])
    with pytest.raises(SystemExit):
        main([*words, f"--output={tmp_path / 'b'}", "--split=other"])
    with pytest.raises(ValueError, match=r"--split: expected one with pairs, got 'ood', which has none"):
        main([*words, f"--output={tmp_path / 'b'}", "--split=ood"])
    single = ppo_helpers.ensemble(tmp_path / "single", tiny_model_dir, members=1)
    with pytest.raises(ValueError, match=r"--ensemble: expected at least 2 members to disagree, got 1"):
        main([*words, f"--output={tmp_path / 'b'}", f"--ensemble={single}"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_heads_export_as_a_plain_classifier(tmp_path, kind, tiny_preferences_file):
    model = helpers.tiny_model(tmp_path / "m", helpers.tiny_tokenizer(tmp_path / "m"), kind=kind)
    data = PreferenceDataModule(model, preferences=tiny_preferences_file, max_length=64, batch_size=4)
    module = RewardModule(
        Pretrained(model),
        HeadEnsemble(3),
        layer=1,
        pooling="last",
        learning_rate=0.1,
        reference=Pretrained(model),
        num_reference=8,
    )
    trainer = ppo_helpers.trainer(tmp_path, max_epochs=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for name, extra in (("plain", ["--classifier=true"]), ("ours", [])):
        main(["export", f"--checkpoint={tmp_path / 'last.ckpt'}", f"--output={tmp_path / name}", *extra])
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert classifier.config.num_labels == 3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    # As anybody would call it: one padded batch of texts, which end with the end of sequence or are cut off.
    texts = ["the film was good<eos>", "Review: a quiet, moving story of one family", "bad film<eos>"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = classifier(**inputs).logits + torch.tensor(classifier.config.reward_offset)
    sequences = [TokenSequence(tokenizer(text)["input_ids"], 1) for text in texts]
    ours = RewardModel.from_pretrained(tmp_path / "ours")
    expected = ours.head(compute_features(ours, sequences, CPU)).members
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_padding_token_that_ends_responses_is_replaced(tmp_path, tiny_preferences_file):
    tokenizer = helpers.tiny_tokenizer(tmp_path / "m", pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    model = helpers.tiny_model(tmp_path / "m", tokenizer)
    folder = ppo_helpers.ensemble(tmp_path / "e", model, members=2)
    save_classifier(RewardModel.from_pretrained(folder), tmp_path / "plain")
    found = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert found.pad_token == "<bos>"
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").config.pad_token_id == 1


def test_what_is_no_plain_classifier_is_refused(trained, sft_run, tmp_path):
    for name in ("lora_ensemble", "full_ensemble"):
        with pytest.raises(ValueError, match=r"a classifier: expected linear heads on one unquantised backbone"):
            main(["export", f"--checkpoint={last(trained(name))}", f"--output={tmp_path / name}", "--classifier=true"])
    with pytest.raises(ValueError, match=r"--classifier: expected a checkpoint of the reward stage, got one of 'sft'"):
        main(["export", f"--checkpoint={last(sft_run)}", f"--output={tmp_path / 'sft'}", "--classifier=true"])


def other_tokenizer(folder):
    """A tiny model whose tokenizer has fewer tokens."""
    tokenizer = helpers.tiny_tokenizer(folder, pad=False)
    return helpers.tiny_model(folder, tokenizer)


def test_a_tokenizer_of_another_vocabulary_is_refused(
    tiny_ensemble_dir, tiny_model_dir, tiny_preferences_file, tmp_path
):
    other = other_tokenizer(tmp_path / "other")
    words = [f"--ensemble={tiny_ensemble_dir}", f"--data.preferences={tiny_preferences_file}", "--data.max_length=64"]
    message = r"--data.tokenizer: expected the data's tokenizer and the model to have one vocabulary, got '.*' and '.*'"
    for command, more in (("calibrate", [f"--reference.path={other}"]), ("disagreement", ["--split=train"])):
        output = f"--output={tmp_path / command}"
        with pytest.raises(ValueError, match=message):
            main(["reward", command, *words, *more, f"--data.tokenizer={other}", output])
        assert not (tmp_path / command).exists()
    data = PreferenceDataModule(tiny_model_dir, preferences=tiny_preferences_file, max_length=64, batch_size=4)
    module = RewardModule(Pretrained(tiny_model_dir), HeadEnsemble(2), reference=Pretrained(other), num_reference=4)
    with pytest.raises(ValueError, match=r"model.reference: expected the data's tokenizer and the model to have one"):
        ppo_helpers.trainer(tmp_path).fit(module, data)


def test_an_error_leaves_no_half_made_folder(
    tiny_ensemble_dir, tiny_model_dir, tiny_prompts_file, tmp_path, monkeypatch
):
    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr("lit_vapo.rewards.ensemble.save_file", fails)
    words = [f"--ensemble={tiny_ensemble_dir}", f"--reference.path={tiny_model_dir}", "--num_reference=4"]
    data = [f"--data.tokenizer={tiny_model_dir}", f"--data.prompts={tiny_prompts_file}", "--sampling.max_new_tokens=3"]
    with pytest.raises(OSError, match="no space left"):
        main(["reward", "calibrate", *words, *data, f"--output={tmp_path / 'new'}"])
    assert list(tmp_path.iterdir()) == []


# Scores that are no numbers, posteriors, 8 bit.


def test_half_precision_throughout_is_refused(tiny_model_dir, tiny_preferences_file, tmp_path):
    data = PreferenceDataModule(tiny_model_dir, preferences=tiny_preferences_file, max_length=64, batch_size=4)
    message = r"trainer.precision: expected 32-true or bf16-mixed or 16-mixed, got bf16-true"
    with pytest.raises(ValueError, match=message):
        ppo_helpers.trainer(tmp_path, precision="bf16-true").fit(RewardModule(Pretrained(tiny_model_dir)), data)


def test_a_posterior_does_not_stream(tiny_model_dir, tiny_preferences_file, tmp_path):
    data = PreferenceDataModule(
        tiny_model_dir, preferences=tiny_preferences_file, max_length=64, batch_size=4, streaming=True,
        validation_fraction=0.0, stream_buffer=8,
    )  # fmt: skip
    module = RewardModule(Pretrained(tiny_model_dir), BayesianLinear())
    with pytest.raises(ValueError, match=r"data.streaming: expected false for BayesianLinear, which holds all"):
        ppo_helpers.trainer(tmp_path, max_steps=2).fit(module, data)


def test_a_test_of_nothing_is_refused(tiny_model_dir, tiny_preferences_file, tmp_path):
    options = {"validation_fraction": 0.0, "max_length": 64, "preferences_ood": tiny_preferences_file}
    data = PreferenceDataModule(tiny_model_dir, preferences=tiny_preferences_file, **options)
    with pytest.raises(ValueError, match=r"data.preferences_test: expected pairs to test on .*, got none"):
        ppo_helpers.trainer(tmp_path).test(RewardModule(Pretrained(tiny_model_dir)), data)


def test_adapters_need_their_backbone(tiny_model_dir, trained, tmp_path):
    main(["export", f"--checkpoint={last(trained('lora_ensemble'))}", f"--output={tmp_path / 'out'}"])
    with pytest.raises(ValueError, match=r"with_backbone: expected true for LoraEnsemble, whose members change the"):
        RewardModel.from_pretrained(tmp_path / "out", with_backbone=False)
    with pytest.raises(ValueError, match=r"expected states of 3 members, got those of the backbone alone"):
        RewardModel.from_pretrained(tmp_path / "out").head.join([torch.zeros(4, 32)])


def test_a_score_that_is_no_number_names_the_example(tiny_model_dir, tiny_preferences_file, tmp_path):
    data = PreferenceDataModule(tiny_model_dir, preferences=tiny_preferences_file, max_length=64, batch_size=4)
    module = RewardModule(Pretrained(tiny_model_dir), HeadEnsemble(3))
    module.head.build(32)
    module.head.bias.data[1] = float("nan")
    message = r"preferences.jsonl, line \d+: expected a finite score, got nan"
    with pytest.raises(ValueError, match=message):
        ppo_helpers.trainer(tmp_path).test(module, data, verbose=False)


@pytest.mark.parametrize("cached", [True, False])
def test_the_posterior_sees_all_training_pairs(tiny_model_dir, tiny_preferences_file, tmp_path, cached, monkeypatch):
    seen = []
    settle = BayesianLinear.settle

    def spy(self, pairs):
        pairs = list(pairs)
        seen.append(sum(len(p.chosen) for p in pairs))
        settle(self, pairs)

    monkeypatch.setattr(BayesianLinear, "settle", spy)
    data = PreferenceDataModule(tiny_model_dir, preferences=tiny_preferences_file, max_length=64, batch_size=4)
    module = RewardModule(Pretrained(tiny_model_dir), BayesianLinear(), freeze_backbone=cached)
    trainer = ppo_helpers.trainer(tmp_path, max_epochs=2)
    trainer.fit(module, data)
    assert set(seen) == {len(data.preference_rows("train"))}
    assert trainer.callback_metrics["val/accuracy"] > 0.9


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("kind", [HeadEnsemble, LoraEnsemble])
def test_a_quantised_base_trains_and_loads_back(tmp_path, tiny_preferences_file, kind, quantization):
    tokenizer = helpers.tiny_tokenizer(tmp_path / "m")
    model = helpers.tiny_model(tmp_path / "m", tokenizer, hidden_size=128, intermediate_size=128)
    data = PreferenceDataModule(model, preferences=tiny_preferences_file, max_length=64, batch_size=4)
    module = RewardModule(Pretrained(model, quantization=quantization), kind(2), learning_rate=1e-2)
    trainer = ppo_helpers.trainer(tmp_path, max_epochs=3)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/accuracy"] > 0.8
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    main(["export", f"--checkpoint={tmp_path / 'last.ckpt'}", f"--output={tmp_path / 'out'}"])
    again = RewardModel.from_pretrained(tmp_path / "out")
    assert again.spec.base.quantization == quantization
    (result,) = trainer.test(module, data, verbose=False)
    rows = data.preference_rows("test")
    sides = [[TokenSequence(r[s], r["prompt_length"]) for r in rows] for s in ("chosen_ids", "rejected_ids")]
    margin = again.head.margin(*(compute_features(again, side, CPU) for side in sides))
    assert (margin.mean > 0).float().mean().item() == pytest.approx(result["test/accuracy"])
