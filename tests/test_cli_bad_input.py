"""What the command line refuses, by name and before training begins, and what it handles."""

import pytest
import torch
import yaml
from helpers import CONFIGS, last, tiny_model, tiny_tokenizer, write_jsonl
from ppo_helpers import ensemble

from lit_vapo.cli import STAGES, main

TURN = [{"role": "user", "content": "hi"}]


# Checkpoints that do not fit.


@pytest.mark.parametrize(("run", "stage"), [("sft_run", "reward"), ("reward_run", "ppo"), ("ppo_run", "sft")])
def test_a_checkpoint_of_another_stage_is_refused(stage_args, tmp_path, request, run, stage, untrained):
    other = request.getfixturevalue(run)
    ensemble = {"model__reward": request.getfixturevalue("tiny_ensemble_dir")} if stage == "ppo" else {}
    message = f"checkpoint: expected one of stage '{stage}', got one of stage '{run.removesuffix('_run')}'"
    with pytest.raises(ValueError, match=message):
        main(stage_args(stage, "fit", tmp_path / "run", ckpt_path=last(other), **ensemble))


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory):
    """A model twice as wide."""
    path = tmp_path_factory.mktemp("wide") / "model"
    return tiny_model(path, tiny_tokenizer(path), hidden_size=64)


@pytest.mark.filterwarnings("ignore:checkpoint. model.* was .* and is now:UserWarning")
def test_a_checkpoint_of_another_architecture_is_refused(stage_args, reward_run, sft_run, wide_model_dir, tmp_path):
    message = r"checkpoint of another architecture: expected .* of shape \(.*\), got \(.*\)"
    with pytest.raises(ValueError, match=message):
        main(stage_args("reward", "test", tmp_path / "a", ckpt_path=last(reward_run), model__base__path=wide_model_dir))
    with pytest.raises(ValueError, match=message):
        main(stage_args("sft", "test", tmp_path / "b", ckpt_path=last(sft_run), model__base__path=wide_model_dir))
    members = "--model.head.init_args.num_members=5"
    with pytest.raises(ValueError, match=r"expected head.weight of shape \(5, 32\), got \(3, 32\)|of shape \(5"):
        main(stage_args("reward", "test", tmp_path / "c", members, ckpt_path=last(reward_run)))
    lora = "--model.lora.rank=4"
    with pytest.raises(ValueError, match="checkpoint of another architecture: unknown weights|no weights for"):
        main(stage_args("sft", "test", tmp_path / "d", lora, ckpt_path=last(sft_run)))


# What is refused before training.


@pytest.mark.parametrize(
    ("options", "key"),
    [(["--model.learningrate=1"], "model.learningrate"), (["--data.batchsize=1"], "data.batchsize")],
)
def test_an_unknown_option_is_named(stage_args, tmp_path, capsys, untrained, options, key):
    with pytest.raises(SystemExit):
        main(stage_args("reward", "fit", tmp_path / "run", *options))
    assert key in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        (["--model.learningrate=1"], "--model.learning_rate"),
        (["--trainer.max_epoch=1"], "--trainer.max_epochs"),  # a beginning is no option either
        (["--num_reference=1"], "--model.num_reference"),
        (["--backbone_learning_rat=1"], "--model.backbone_learning_rate"),
        (["--num_responses=1"], "--model.reference_sampling.num_responses"),  # too far from the whole name
        (["--model.head=HeadEnsembl"], "HeadEnsemble"),
        (["--model.head=HeadEnsemble", "--model.head.num_member=3"], "num_members"),
    ],
)
def test_who_mistypes_is_told_what_there_is(stage_args, tmp_path, capsys, untrained, options, meant):
    with pytest.raises(SystemExit):
        main(stage_args("reward", "fit", tmp_path / "run", *options))
    said = capsys.readouterr().err
    assert f"\nDid you mean {meant}?\n" in said
    assert options[-1].partition("=")[0].removesuffix(".num_member").removeprefix("--") in said


def test_a_mistyped_key_of_a_file_is_told_what_there_is(stage_args, tmp_path, capsys, untrained):
    (tmp_path / "config.yaml").write_text("model:\n  learningrate: 1\n")
    with pytest.raises(SystemExit):
        main(stage_args("reward", "fit", tmp_path / "run", f"--config={tmp_path}/config.yaml"))
    assert "Did you mean model.learning_rate?" in capsys.readouterr().err


def test_classes_to_choose_from_are_listed(stage_args, tmp_path, capsys, untrained):
    with pytest.raises(SystemExit):
        main(stage_args("reward", "fit", tmp_path / "run", "--model.head=Unheard"))
    said = capsys.readouterr().err
    assert "expected one of AleatoricEnsemble, BayesianLinear" in said
    assert "Did you mean" not in said


@pytest.mark.parametrize(
    ("section", "key"), [("model", "learningrate"), ("data", "batchsize"), ("trainer", "epochs"), (None, "modle")]
)
def test_an_unknown_key_of_a_file_is_named(stage_args, tmp_path, capsys, untrained, section, key):
    config = yaml.safe_load((CONFIGS / "reward" / "tiny.yaml").read_text())
    (config if section is None else config[section])[key] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(stage_args("reward", "fit", tmp_path / "run", config=tmp_path / "config.yaml"))
    assert key in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_value_of_another_type_is_named(stage_args, tmp_path, capsys, untrained):
    with pytest.raises(SystemExit):
        main(stage_args("sft", "fit", tmp_path / "run", data__batch_size="many"))
    assert "data.batch_size" in capsys.readouterr().err


ROWS = [
    ('{"prompt": "p", "chosen": "a"}', "line 2: expected column 'rejected', got columns ['chosen', 'prompt']"),
    ('{"prompt": "p", "chosen": 3, "rejected": "b"}', "line 2: expected text or messages in column 'chosen', got"),
    ('{"prompt": null, "chosen": "a", "rejected": "b"}', "line 2: expected a prompt in column 'prompt', as other rows"),
    ('{"prompt": "p", ', "line 2: expected a JSON object, got malformed JSON"),
]


@pytest.mark.parametrize(("stage", "line", "message"), [("sft", *ROWS[0]), *(("reward", *row) for row in ROWS)])
def test_bad_rows_are_named_before_a_model_is_loaded(stage_args, tmp_path, monkeypatch, stage, line, message):
    def loading(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lit_vapo.models.pretrained.AutoModel.from_pretrained", loading)
    monkeypatch.setattr("lit_vapo.models.pretrained.AutoModelForCausalLM.from_pretrained", loading)
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "p", "chosen": "a", "rejected": "b"}}\n{line}\n')
    with pytest.raises(ValueError) as error:  # noqa: PT011 – the message is compared as it stands
        main(stage_args(stage, "fit", tmp_path / "run", data__preferences=path))
    assert f"{path}, {message}" in str(error.value)


ANSWER, OTHER = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
CONVERSATIONS = {
    "sft": {"prompt": TURN, "chosen": [ANSWER], "rejected": [OTHER]},
    "reward": {"chosen": [*TURN, ANSWER], "rejected": [*TURN, OTHER]},
    "ppo": {"prompt": TURN},
}


@pytest.mark.parametrize("stage", STAGES)
def test_conversations_want_a_chat_template(stage_args, tmp_path, request, stage, untrained):
    tiny_tokenizer(tmp_path / "plain")
    path = write_jsonl(tmp_path / "chat.jsonl", [CONVERSATIONS[stage]])
    ensemble = {"model__reward": request.getfixturevalue("tiny_ensemble_dir")} if stage == "ppo" else {}
    options = {"data__tokenizer": tmp_path / "plain", "data__preferences": path, "data__prompts": path, **ensemble}
    message = (
        rf"chat.jsonl, line 1: expected a tokenizer with a chat template for conversational data, got "
        rf"'{tmp_path / 'plain'}', which has none"
    )
    with pytest.raises(ValueError, match=message):
        main(stage_args(stage, "fit", tmp_path / "run", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__kl_coef": -0.1}, r"model.kl_coef: expected a number of 0 or more, got -0.1"),
        ({"model__kl_target": 0}, r"model.kl_target: expected a number above 0, got 0"),
        ({"model__num_reference": 1}, r"model.num_reference: expected at least 2, got 1"),
        ({"samples__num_samples": 0}, r"samples.num_samples: expected at least 1, got 0"),
        ({"data__max_prompt_length": 3}, r"prompts.jsonl, line 1: expected a prompt of 1 … 3 tokens .*, got \d+"),
        (
            {"model__sampling__max_new_tokens": 100},
            r"data.max_prompt_length \+ model.sampling.max_new_tokens: expected at most the model's context of 128 "
            "tokens, got a sequence of 132",
        ),
        ({"model__reward": "nowhere"}, r"reward: expected a folder with ensemble.json .*, got 'nowhere'"),
        ({"data__batch_size": 1000}, r"data.batch_size: expected at most the \d+ prompts there are, got 1000"),
        (
            {"model__objective": "lit_vapo.objectives.single_reward.SingleReward", "model__objective__member": 3},
            r"member: expected an index below the 3 members, got 3",
        ),
        ({"model__base__path": "./gone"}, r"base.path: expected a folder with a transformers model"),
        ({"data__tokenizer": "./gone"}, r"data.tokenizer: expected a folder or hub name of a tokenizer, got './gone'"),
        ({"data__prompts": "gone.jsonl"}, r"data.prompts: expected a file, got 'gone.jsonl', which does not exist"),
    ],
)
def test_bad_settings_of_ppo_are_named(stage_args, tiny_ensemble_dir, tmp_path, options, message, untrained):
    with pytest.raises(ValueError, match=message):
        main(stage_args("ppo", "fit", tmp_path / "run", **{"model__reward": tiny_ensemble_dir, **options}))
    assert not (tmp_path / "run" / "finished.json").exists()
    assert not last(tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__weight_decay": -1}, r"model.weight_decay: expected a number of 0 or more, got -1"),
        ({"model__weight_decay": ".nan"}, r"model.weight_decay: expected a number of 0 or more, got nan"),
        ({"model__warmup_steps": -1}, r"model.warmup_steps: expected a number of 0 or more, got -1"),
    ],
)
def test_bad_settings_of_sft_are_named(stage_args, tmp_path, options, message, untrained):
    with pytest.raises(ValueError, match=message):
        main(stage_args("sft", "fit", tmp_path / "run", **options))


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_pairs_is_one_or_more(tiny_ensemble_dir, tiny_model_dir, tiny_preferences_file, tmp_path, count):
    data = [f"--data.tokenizer={tiny_model_dir}", f"--data.preferences={tiny_preferences_file}"]
    given = [f"--ensemble={tiny_ensemble_dir}", f"--output={tmp_path / 'out'}", f"--max_pairs={count}", *data]
    with pytest.raises(ValueError, match=f"--max_pairs: expected at least 1, got {count}"):
        main(["reward", "disagreement", *given])
    assert not (tmp_path / "out").exists()


def test_a_variance_wants_two_members(stage_args, tmp_path, untrained, tiny_model_dir):
    one = ensemble(tmp_path / "one", tiny_model_dir, members=1)
    message = r"objective VarianceAware needs the variance of an ensemble: expected at least 2 members, got 1"
    with pytest.raises(ValueError, match=message):
        main(stage_args("ppo", "fit", tmp_path / "run", model__reward=one))


# What is handled.


def test_nothing_set_aside_for_validation(stage_args, tmp_path):
    main(stage_args("sft", "fit", tmp_path / "run", data__validation_fraction=0))
    assert (tmp_path / "run" / "finished.json").is_file()


def test_a_tokenizer_without_padding_trains(stage_args, tmp_path):
    model = tiny_model(tmp_path / "model", tiny_tokenizer(tmp_path / "model", pad=False))
    main(stage_args("reward", "fit", tmp_path / "run", data__tokenizer=model, model__base__path=model))
    assert torch.load(last(tmp_path / "run"), weights_only=True)["global_step"] == 2
