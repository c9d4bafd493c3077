"""`lit-vapo plan`: what it prints, what it proposes, what it refuses."""

import json

import pytest
from helpers import CONFIGS
from plan_helpers import config_only

from lit_vapo.cli import main
from lit_vapo.commands.plan import changes
from lit_vapo.commands.plan_settings import chosen_stage, read_settings
from lit_vapo.plan.formulas import fits
from lit_vapo.plan.gpus import GPUS, Gpu


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Llama of two blocks, of which there is nothing but config.json."""
    return config_only(tmp_path_factory.mktemp("small") / "model", num_hidden_layers=2)


@pytest.fixture
def words(small):
    def call(stage, *options):
        return [
            f"--config={CONFIGS / stage / 'tiny.yaml'}",
            f"--model.base.path={small}",
            f"--data.tokenizer={small}",
            *(["--model.reward=runs/none"] if stage == "ppo" else []),
            *options,
        ]

    return call


def test_a_plan_names_phases_parts_and_gpus(words, capsys):
    main(["plan", *words("ppo")])
    said = capsys.readouterr().out
    assert "phase    weights  gradients  optimiser  casts  activations  cache  logits  workspace  peak" in said
    assert all(f"\n{phase} " in said for phase in ("rollout", "scoring", "update"))
    assert all(f"\n{name} " in said for name in GPUS)
    assert "no rewards in runs/none yet" in said
    assert "as long as it may be" in said


def test_a_plan_as_json_adds_up(words, capsys):
    main(["plan", "ppo", "fit", *words("ppo"), "--gpu=h100", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["peak"] == max(sum(parts.values()) for parts in said["phases"].values())
    assert list(said["gpus"]) == ["H100"]
    assert said["gpus"]["H100"]["fits"] is True
    assert all(seconds > 0 for seconds in said["gpus"]["H100"]["seconds"].values())


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        (["--model.head=HeadEnsemble"], ["features", "training"]),
        (["--model.head=LoraEnsemble", "--model.head.num_members=2"], ["training"]),
    ],
)
def test_reward_training_is_planned(words, options, phases):
    plan = read_settings("reward", words("reward", "--model.reference=null", *options)).plan()
    assert list(plan.phases) == phases


def test_the_reference_comes_before_reward_training(words, small):
    plan = read_settings("reward", words("reward", f"--model.reference.path={small}")).plan()
    assert list(plan.phases) == ["reference", "features", "training"]
    assert plan.phases["reference"]["weights"] > plan.phases["features"]["weights"]  # it has a head
    assert plan.phases["reference"]["optimiser"] == 0


def test_another_optimiser_is_told_to_be_planned_as_adamw(words):
    notes = read_settings("sft", words("sft")).notes
    assert not any("optimiser" in note for note in notes)
    notes = read_settings("sft", words("sft", "--model.optimizer=torch.optim.SGD")).notes
    assert any("the optimiser is planned as AdamW" in note for note in notes)


def test_supervised_fine_tuning_is_planned(words):
    plan = read_settings("sft", words("sft", "--model.lora=null")).plan()
    parts = plan.phases["training"]
    # Moments are twice the weights, all of which are trained; buffers are not.
    assert parts["optimiser"] == pytest.approx(2 * parts["weights"], rel=0.01)


def test_devices_divide_what_they_share(words, small):
    full = ["--model.lora=null"]
    one, shared, copied = (
        read_settings("sft", words("sft", *full), devices, strategy).plan().phases["training"]
        for devices, strategy in ((1, None), (4, "fsdp2"), (4, "ddp"))
    )
    assert shared["optimiser"] == one["optimiser"] / 4
    assert one["weights"] / 4 < shared["weights"] <= 1.3 * one["weights"]  # both blocks are gathered
    assert copied["weights"] == one["weights"]
    assert shared["activations"] == one["activations"]


# The stage.


def test_settings_of_the_model_tell_the_stage(words):
    assert chosen_stage(words("ppo"))[0] == "ppo"
    assert chosen_stage(words("reward", "--model.head=HeadEnsemble"))[0] == "reward"
    assert chosen_stage(["sft", "fit", "--x"]) == ("sft", ["--x"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["dpo"], r"plan: expected a stage \(ppo, reward, sft\) or options, got 'dpo'"),
        (["--model.base.path=m"], r"as the first word, since what is set of the model \(base\) fits ppo, reward, sft"),
        (["--model.nonsense=1"], r"what is set of the model \(nonsense\) fits none"),
    ],
)
def test_a_stage_that_is_not_told_is_asked_for(given, said):
    with pytest.raises(ValueError, match=said):
        main(["plan", *given])


# What is refused.


def test_an_unknown_gpu_is_refused_with_those_that_are_known(words):
    said = "^--gpu: expected one of T4, V100, A10G, L4, L40S, RTX3090, .*, H100, H200, B200, got 'H900'$"
    with pytest.raises(ValueError, match=said):
        main(["plan", *words("ppo"), "--gpu=H900"])


def test_a_model_without_configuration_is_refused(words, tmp_path):
    with pytest.raises(ValueError, match=r"model.base.path: expected a folder with a transformers model .config.json"):
        main(["plan", *words("ppo", f"--model.base.path={tmp_path / 'none'}")])


def test_eight_bits_that_would_be_divided_are_refused(words):
    said = "model.base.quantization: expected 4bit or null under fsdp2, got 8bit, which cannot be cut"
    with pytest.raises(ValueError, match=said):
        main(["plan", *words("ppo", "--model.base.quantization=8bit"), "--devices=2", "--strategy=fsdp2"])


def test_all_devices_are_asked_for_their_number(words):
    with pytest.raises(ValueError, match="--devices: expected how many there are"):
        main(["plan", *words("ppo"), "--trainer.devices=-1"])


# What would make it fit.


@pytest.fixture
def card(monkeypatch):
    """A GPU of some kilobytes."""

    def call(memory):
        monkeypatch.setitem(GPUS, "tiny", Gpu("tiny", memory, 1e9, 1e9, 1e9, 1e9))

    return call


def test_the_cheapest_change_that_fits_is_planned_again(words, card, capsys):
    # One minibatch of 16 rows of 126 tokens.
    options = words("ppo", "--data.batch_size=16", "--data.max_prompt_length=120", "--model.update.minibatches=1")
    wide = read_settings("ppo", options).plan()
    narrow = read_settings("ppo", [*options, "--model.update.micro_batch_tokens=1024"]).plan()
    assert narrow.peak < wide.peak
    memory = (narrow.peak + wide.peak) / 2 / 0.9
    card(memory)
    main(["plan", *options, "--gpu=tiny", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["change"]["options"] == ["--model.update.micro_batch_tokens=1024"]
    assert said["change"]["peak"] == narrow.peak
    assert fits(narrow.peak, memory)


def test_where_nothing_helps_the_plan_says_so(words, card, capsys, monkeypatch):
    card(10.0)
    monkeypatch.setattr("lit_vapo.commands.plan.changes", lambda settings: list(changes(settings))[:1])
    main(["plan", *words("ppo", "--model.update.micro_batch_tokens=64"), "--gpu=tiny"])
    assert "It does not fit the tiny, nor with all that was tried" in capsys.readouterr().out


def test_changes_begin_with_what_changes_no_result(words):
    settings = read_settings("ppo", words("ppo", "--model.lora=null", "--data.batch_size=64"))
    names = [change.name for change in changes(settings)]
    assert names[:4] == ["smaller microbatches", "gradient checkpointing", "smaller batches", "adapters (LoRA)"]
    assert names[4:6] == ["8 bits a weight", "4 bits a weight"]
    assert names[6:] == [f"{n} devices with FSDP2" for n in (2, 4, 8, 16)]
