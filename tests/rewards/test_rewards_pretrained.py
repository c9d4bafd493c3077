"""Public reward models as members: what they read, where they are read, and what is refused."""

import json
import weakref
from pathlib import Path

import helpers
import ppo_helpers
import public_helpers as public
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_vapo.functional import ensemble_estimate
from lit_vapo.models.digests import seal
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.models.sequence_classifier import classify, load_classifier
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards import PretrainedRewards, load_reward
from lit_vapo.stages.ppo.module import PPOModule


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folders of two reward models that differ in tokenizer and template."""
    folder = tmp_path_factory.mktemp("public")
    first = public.classifier(folder / "a", seed=1)
    return [first, public.classifier(folder / "b", seed=2, template=helpers.CHAT, pad=False)]


def source(*paths, **kwargs):
    """Public reward models, loaded."""
    made = PretrainedRewards([Pretrained(path) for path in paths], **kwargs)
    made.prepare(None)
    return made


def alone(path, texts):
    """What transformers itself says of each whole text, one by one, so that nothing is padded."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
        return torch.cat([last_logits(model, one) for one in ids])


def last_logits(model, ids):
    """Logits at the last token, whatever the configuration says of padding."""
    model.config.pad_token_id = None
    return model(input_ids=ids).logits


def chats(path, texts=public.TEXTS, prompts=public.MESSAGES):
    """Conversations as the model's own template writes them."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [
        tokenizer.apply_chat_template([*p.content, {"role": "assistant", "content": text}], tokenize=False)
        for p, text in zip(prompts, texts, strict=True)
    ]


# What they read.


def test_each_model_reads_the_whole_conversation_as_its_own_template_writes_it(two):
    estimate = source(*two).score(public.responses())
    expected = torch.cat([alone(path, chats(path)) for path in two], dim=1)
    assert chats(two[0])[0].endswith("<eos>\n")  # the line break after the stop token is what the model was read at
    torch.testing.assert_close(estimate.members, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(estimate.variance, expected.var(dim=1), atol=1e-5, rtol=1e-4)
    assert estimate.members.dtype == torch.float32
    assert estimate.reference_variance is None  # nobody has measured it


def test_a_response_that_was_cut_off_is_read_at_the_same_place(two):
    scorer = source(*two)
    whole, cut = (scorer.score(public.responses(finished=[x] * 3)) for x in (True, False))
    torch.testing.assert_close(whole.members, cut.members)


def test_a_text_ends_with_the_end_of_sequence(two):
    estimate = source(two[0]).score(public.responses(["the film was"], [" good"]))
    torch.testing.assert_close(estimate.members, alone(two[0], ["the film was good<eos>"]), atol=1e-5, rtol=1e-5)


def test_a_text_ends_as_the_tokenizer_ends_every_text(tmp_path):
    from tokenizers import processors

    path = public.classifier(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(path)
    ends = [("<bos>", tokenizer.bos_token_id), ("<pad>", tokenizer.pad_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <pad>", special_tokens=ends)
    tokenizer.save_pretrained(path)
    estimate = source(path).score(public.responses(["the film was"], [" good"]))
    expected = alone(path, ["<bos>the film was good<pad>"])
    torch.testing.assert_close(estimate.members, expected, atol=1e-5, rtol=1e-5)


def test_control_tokens_in_a_response_are_text(two):
    scorer = source(two[0])
    spoken, ended = (scorer.score(public.responses(texts=[text] * 3)).mean for text in ("good<eos>", "good"))
    assert not torch.isclose(spoken, ended).any()


# Where they are read: at the true last token.


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("pad", "pad_id"), [(True, None), (False, None), (False, 0), (True, 0)])
def test_padding_changes_nothing(tmp_path, kind, pad, pad_id):
    # Without a token to pad with; with the end of sequence (0), as many have it; and with one of its own.
    path = public.classifier(tmp_path / "m", kind=kind, template=helpers.CHAT, pad=pad, pad_id=pad_id)
    model = load_classifier(Pretrained(path), "reward.models[0]")
    before = model.config.pad_token_id
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [tokenizer(text)["input_ids"] for text in chats(path)]
    assert len({len(x) for x in ids}) == 3
    assert {x[-1] for x in ids} == {0}
    together = classify(model, ids)
    torch.testing.assert_close(together, torch.cat([classify(model, [x]) for x in ids]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, classify(model, ids, tokens=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, alone(path, chats(path)), atol=1e-5, rtol=1e-5)
    assert model.config.pad_token_id == before


def test_an_encoder_is_padded_with_its_own_token(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    path = public.classifier(tmp_path / "m", kind="roberta", template=helpers.CHAT, **sizes)
    model = load_classifier(Pretrained(path), "reward.models[0]")
    ids = [AutoTokenizer.from_pretrained(path)(text)["input_ids"] for text in chats(path)]
    torch.testing.assert_close(
        classify(model, ids), torch.cat([classify(model, [x]) for x in ids]), atol=1e-5, rtol=1e-5
    )


def test_half_precision_keeps_a_sharp_head(tmp_path):
    path = public.classifier(tmp_path / "m")
    half = PretrainedRewards([Pretrained(path, dtype="bfloat16")])
    half.prepare(None)
    found = half.score(public.responses()).members
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found, source(path).score(public.responses()).members, atol=0.3, rtol=0.1)
    # The precision of the trainer is not theirs.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(half.score(public.responses()).members, found)


# Members.


def test_labels_of_one_model_are_members(tmp_path):
    path = public.classifier(tmp_path / "m", labels=3)
    scorer = source(path)
    assert scorer.num_members == 3
    torch.testing.assert_close(scorer.score(public.responses()).members, alone(path, chats(path)), atol=1e-5, rtol=1e-5)


def test_models_that_are_read_anew_score_alike(two, monkeypatch):
    resident, anew = source(*two), source(*two, resident=False)
    assert len(resident.networks) == 2
    assert len(anew.networks) == 0
    expected = resident.score(public.responses()).members
    # In the memory of one: each is gone before the next is there.
    alive, most = [], []
    load = PretrainedRewards.prepare.__globals__["load_classifier"]

    def spy(spec, key):
        most.append(sum(x() is not None for x in alive))
        model = load(spec, key)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr("lit_vapo.rewards.pretrained.load_classifier", spy)
    torch.testing.assert_close(anew.score(public.responses()).members, expected)
    assert most == [0, 0]


def test_members_are_normalised_on_reference_responses(two):
    scorer = source(*two)
    raw = scorer.score(public.responses()).members
    assert not scorer.calibrated
    scorer.calibrate([public.responses()])
    assert scorer.calibrated
    estimate = scorer.score(public.responses())
    torch.testing.assert_close(estimate.members, (raw - raw.mean(0)) / raw.std(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(estimate.reference_variance, estimate.variance.mean())
    torch.testing.assert_close(estimate.mean, ensemble_estimate(estimate.members).mean)
    assert scorer.own_state() == {
        f"normaliser.{x}" for x in ("reward_loc", "reward_scale", "reference_variance", "calibrated")
    }


def test_nothing_of_a_public_model_learns(two):
    scorer = source(*two).train()
    assert not any(p.requires_grad for p in scorer.parameters())
    assert not any(module.training for module in scorer.modules())


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("resident", [True, False])
def test_quantised_models_score(tmp_path, quantization, resident):
    path = public.classifier(tmp_path / "m", hidden_size=128, intermediate_size=128)
    other = public.classifier(tmp_path / "n", seed=1)
    scorer = PretrainedRewards([Pretrained(path, quantization=quantization), Pretrained(other)], resident)
    scorer.prepare(None)
    found = scorer.score(public.responses()).members
    expected = source(path, other).score(public.responses()).members
    torch.testing.assert_close(found[:, 1], expected[:, 1])
    assert torch.corrcoef(torch.stack([found[:, 0], expected[:, 0]]))[0, 1] > 0.8
    assert not any("normaliser" not in name and "networks" not in name for name in scorer.state_dict())


# What is refused.


def refused(match, *paths, **kwargs):
    with pytest.raises(ValueError, match=match):
        PretrainedRewards([Pretrained(str(path), **kwargs) for path in paths]).prepare(None)


def test_what_files_tell_is_told_before_weights_are_read(tmp_path, two, monkeypatch):
    monkeypatch.delattr("lit_vapo.rewards.pretrained.load_classifier")
    three = public.classifier(tmp_path / "m", labels=3)
    assert PretrainedRewards([Pretrained(three)]).num_members == 3
    assert not PretrainedRewards([Pretrained(three)]).state_dict()
    PretrainedRewards([Pretrained(path) for path in two]).check()
    with pytest.raises(ValueError, match=r"reward.models\[0\]: expected a reward model with one label"):
        PretrainedRewards([Pretrained(three), Pretrained(two[0])]).check()
    with pytest.raises(ValueError, match=r"reward.models\[1\].path: expected a folder with a transformers model"):
        PretrainedRewards([Pretrained(two[0]), Pretrained(str(tmp_path / "none"))]).check()


def test_no_models_are_refused():
    refused(r"reward.models: expected at least one public reward model, got none")


def test_models_of_several_labels_beside_others_are_refused(tmp_path, two):
    path = public.classifier(tmp_path / "m", labels=3)
    refused(
        r"reward.models\[1\]: expected a reward model with one label, since it is one of several, got .* with 3.",
        two[0],
        path,
    )


def test_a_head_that_was_never_trained_is_refused(tmp_path, two):
    model = helpers.tiny_model(tmp_path / "lm", helpers.tiny_tokenizer(tmp_path / "lm"))
    refused(
        r"reward.models\[0\].path: expected a trained reward model .* without score.weight: they would be random", model
    )


def test_a_head_of_another_size_is_refused(tmp_path):
    path = public.classifier(tmp_path / "m")
    config = Path(path) / "config.json"
    held = json.loads(config.read_text())
    held["id2label"], held["label2id"] = {"0": "a", "1": "b"}, {"a": 0, "b": 1}
    config.write_text(json.dumps(held))
    refused(r"reward.models\[0\].path: expected", path)


def test_an_encoder_without_a_padding_token_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    path = public.classifier(tmp_path / "m", kind="bert", **sizes)
    config = Path(path) / "config.json"
    held = json.loads(config.read_text())
    held["pad_token_id"] = None
    config.write_text(json.dumps(held))
    refused(r"reward.models\[0\].path: expected a padding token .*, got none in .* \(BertForSequence", path)


def test_messages_without_a_template_are_refused(tmp_path):
    path = public.classifier(tmp_path / "m", template=None)
    scorer = source(path)
    scorer.score(public.responses(["the film"], [" good"]))
    with pytest.raises(ValueError, match=r"reward: expected a tokenizer with a chat template for conversational data"):
        scorer.score(public.responses())


def test_pickled_weights_are_refused(tmp_path):
    path = Path(public.classifier(tmp_path / "m"))
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    refused(r"reward.models\[0\].path: expected weights in \*.safetensors in .*, got \[.*'pytorch_model.bin'", path)


def test_an_adapter_is_refused(tmp_path):
    path = Path(public.classifier(tmp_path / "m"))
    (path / "adapter_config.json").write_text("{}")
    refused(r"reward.models\[0\].path: expected a whole model, got an adapter", path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    refused(r"reward.models\[0\].path: expected a folder with a transformers model", tmp_path / "none")


def test_code_of_a_model_is_refused(tmp_path):
    path = Path(public.classifier(tmp_path / "m"))
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "mine.py").write_text("raise RuntimeError('ran')")
    refused(r"brings Python code of its own, which runs only with reward.models\[0\].trust_remote_code=true", path)


def test_a_text_that_is_too_long_is_refused(tmp_path):
    path = public.classifier(tmp_path / "m", max_position_embeddings=40)
    with pytest.raises(ValueError, match=r"row 1: expected a prompt with its response of at most 40 tokens for the"):
        source(path).score(public.responses(texts=["good", "good " * 60, "bad"]))


def test_tokens_without_an_embedding_are_refused(tmp_path):
    path = public.classifier(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["sparkling"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=r"row 2: expected token ids below \d+, for which the reward model .* has emb"):
        source(path).score(public.responses(texts=["good", "bad", "sparkling"]))


def test_a_reward_that_is_no_number_is_refused(tmp_path):
    path = Path(public.classifier(tmp_path / "m"))
    weights = load_file(path / "model.safetensors")
    name = next(x for x in weights if "embed_tokens" in x)
    tokenizer = AutoTokenizer.from_pretrained(path)
    weights[name][tokenizer("Z")["input_ids"]] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"row 2: expected a finite reward from '.*', got \[nan\] for 'Z'"):
        source(str(path)).score(public.responses(texts=["good", "bad", "Z"]))


# Folders.


def test_a_folder_names_the_models_and_scores_equally(two, tmp_path):
    scorer = source(*two)
    scorer.calibrate([public.responses()])
    scorer.save_pretrained(tmp_path / "saved")
    assert sorted(x.name for x in (tmp_path / "saved").iterdir()) == [
        "digests.json", "normaliser.safetensors", "rewards.json",
    ]  # fmt: skip
    again = load_reward(str(tmp_path / "saved"))
    assert isinstance(again, PretrainedRewards)
    again.prepare(None)
    assert again.calibrated
    for one, other in zip(scorer.score(public.responses())[:4], again.score(public.responses())[:4], strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(FileExistsError, match=r"expected a folder without reward models"):
        scorer.save_pretrained(tmp_path / "saved")


def test_relative_folders_are_found_from_elsewhere(two, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(two[0]).parent)
    PretrainedRewards([Pretrained("a"), Pretrained("b")], resident=False).save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    again = load_reward("saved")
    assert [spec.path for spec in again.models] == two
    assert not again.resident
    assert not again.calibrated


def test_models_of_other_labels_than_were_saved_are_refused(tmp_path):
    path = public.classifier(tmp_path / "m", labels=2)
    source(path).save_pretrained(tmp_path / "saved")
    public.classifier(tmp_path / "m", labels=3)
    with pytest.raises(ValueError, match=r"reward.models: expected 2 labels together, as when they were saved, got 3"):
        load_reward(str(tmp_path / "saved")).check()


def test_a_folder_without_rewards_says_what_should_be_there(tmp_path):
    message = (
        r"reward: expected a folder with ensemble.json \(.*`lit-vapo export`\) or rewards.json \(.*calibrate`\), got"
    )
    with pytest.raises(ValueError, match=message):
        load_reward(str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format_version": 2}, r"rewards.json: format_version: expected 1, got 2"),
        ({"models": []}, r"rewards.json: models: List should have at least 1 item"),
        ({"more": 1}, r"rewards.json: more: expected no such key"),
        ({"num_members": 3}, r"normaliser.safetensors: expected reward_loc of shape \(3,\), got \(2,\)"),
    ],
)
def test_a_folder_that_was_changed_is_refused(two, tmp_path, changed, message):
    source(*two).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "rewards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=message if "num_members" not in changed else "it was changed or damaged"):
        load_reward(str(tmp_path / "saved"))
    seal(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        load_reward(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("reward_scale", torch.tensor([1.0, 0.0]), r"expected reward_scale above 0, got 0.0"),
        ("reward_loc", torch.tensor([1.0, float("nan")]), r"expected reward_loc to be finite"),
        ("reward_loc", torch.zeros(3), r"expected reward_loc of shape \(2,\), got \(3,\)"),
        ("reference_variance", torch.tensor(-1.0), r"expected reference_variance above 0, got -1.0"),
        ("reward_loc", torch.zeros(2, dtype=torch.float64), r"expected reward_loc in torch.float32, got torch.float64"),
    ],
)
def test_a_normaliser_that_makes_no_sense_is_refused(two, tmp_path, name, value, message):
    source(*two).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "normaliser.safetensors"
    save_file(load_file(path) | {name: value}, path)
    with pytest.raises(ValueError, match="it was changed or damaged"):
        load_reward(str(tmp_path / "saved"))
    seal(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        load_reward(str(tmp_path / "saved"))


def test_a_folder_runs_code_of_models_only_where_it_is_trusted(two, tmp_path):
    source(*two).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "rewards.json"
    held = json.loads(path.read_text())
    held["models"][1]["trust_remote_code"] = True
    path.write_text(json.dumps(held))
    seal(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"rewards.json: expected models without code of their own, got trust_remote"):
        load_reward(str(tmp_path / "saved"))
    assert load_reward(str(tmp_path / "saved"), trust=[two[1]]).models[1].trust_remote_code


# PPO.


@pytest.mark.parametrize("resident", [True, False])
def test_ppo_learns_from_public_models_and_goes_on_alike(tiny_model_dir, two, tmp_path, resident):
    def module():
        models = PretrainedRewards([Pretrained(path) for path in two], resident)
        return ppo_helpers.ppo_module(tiny_model_dir, models, objective=VarianceAware(), num_reference=8)

    data = ppo_helpers.prompt_data(tiny_model_dir, tmp_path, 8)
    fitted = module()
    trainer = ppo_helpers.trainer(tmp_path, limit_val_batches=0)
    before = ppo_helpers.state(_loaded(module()))
    trainer.fit(fitted, data)
    assert any(not torch.equal(p, before[n]) for n, p in ppo_helpers.state(fitted).items())
    assert fitted.reward.calibrated
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name for name in held if name.startswith("reward.")} == {f"reward.{x}" for x in fitted.reward.own_state()}
    again = module()
    ppo_helpers.trainer(tmp_path, limit_val_batches=0).validate(
        again, data, ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    answers = public.responses(["the film", "a plot"], [" good", " bad"])
    torch.testing.assert_close(again.reward.score(answers).members, fitted.reward.score(answers).members)
    torch.testing.assert_close(
        again.reward.score(answers).reference_variance, fitted.reward.score(answers).reference_variance
    )


def _loaded(module: PPOModule) -> PPOModule:
    module.configure_model()
    return module
