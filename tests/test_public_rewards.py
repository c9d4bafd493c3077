"""Public reward models through the command line: calibrate, look, test, and align a policy."""

import csv
import json
import re
from pathlib import Path

import helpers
import public_helpers as public
import pytest
import torch
import yaml

from lit_vapo.cli import main
from lit_vapo.commands.evaluate import evaluate
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.rewards import RewardSource, load_reward, protocol
from lit_vapo.types import RewardEstimate

KIND = "lit_vapo.rewards.pretrained.PretrainedRewards"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three public reward models."""
    folder = tmp_path_factory.mktemp("models")
    return [public.classifier(folder / name, seed=k, template=helpers.CHAT) for k, name in enumerate("abc")]


@pytest.fixture(scope="module")
def config(models, tmp_path_factory):
    """Options that name them."""
    path = tmp_path_factory.mktemp("config") / "rewards.yaml"
    settings = {"models": [{"path": path} for path in models], "resident": False}
    path.write_text(yaml.safe_dump({"reward": {"class_path": KIND, "init_args": settings}}))
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Pairs as messages; in every third both answers are of several messages."""
    rows = []
    for i in range(24):
        prompt = [{"role": "user", "content": f"Review {i}"}]
        answers = {}
        for side, word in SIDES.items():
            turns = [{"role": "assistant", "content": f"Hm {word}"}, {"role": "user", "content": "And?"}]
            answers[side] = [*prompt, *turns * (i % 3 == 0), {"role": "assistant", "content": f"{word} {i}"}]
        rows.append({"subset": "ab"[i % 2], **answers})
    return helpers.write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


SIDES = {"chosen": "good", "rejected": "bad film"}


def words(command, *options, **replaced):
    return ["reward", command, *options, *(f"--{k.replace('__', '.')}={v}" for k, v in replaced.items())]


@pytest.fixture(scope="module")
def saved(config, tiny_model_dir, tiny_prompts_file, tmp_path_factory):
    """The models with how they are normalised, as a folder."""
    folder = tmp_path_factory.mktemp("saved") / "public"
    main(
        words(
            "calibrate",
            f"--config={config}",
            output=folder,
            reference__path=tiny_model_dir,
            data__tokenizer=tiny_model_dir,
            data__prompts=tiny_prompts_file,
            sampling__max_new_tokens=5,
            num_reference=12,
        )
    )
    return folder


def test_calibrate_makes_a_folder_of_public_models(saved, models, tiny_model_dir, tiny_prompts_file, tmp_path, capsys):
    assert sorted(x.name for x in saved.iterdir()) == ["digests.json", "normaliser.safetensors", "rewards.json"]
    source = load_reward(str(saved))
    source.prepare(None)
    assert source.calibrated
    assert [spec.path for spec in source.models] == models
    # And again, from the folder, on other responses.
    replaced = {
        "reference__path": tiny_model_dir,
        "data__tokenizer": tiny_model_dir,
        "data__prompts": tiny_prompts_file,
    }
    main(words("calibrate", reward=saved, output=tmp_path / "new", num_reference=8, seed=1, **replaced))
    again = load_reward(str(tmp_path / "new"))
    again.prepare(None)
    assert (again.normaliser.reward_loc != source.normaliser.reward_loc).all()
    assert "calibrated on 8 responses" in capsys.readouterr().out
    asked = public.responses(["the film"], [" was good"])
    raw = source.score(asked).members * source.normaliser.reward_scale + source.normaliser.reward_loc
    expected = (raw - again.normaliser.reward_loc) / again.normaliser.reward_scale
    torch.testing.assert_close(again.score(asked).members, expected, atol=1e-4, rtol=1e-4)


def test_what_no_folder_holds_is_not_calibrated(tmp_path, tiny_model_dir, tiny_prompts_file):
    message = r"reward: expected a source that a folder can hold, .*, got RemoteReward; PPO calibrates it at its start"
    path = tmp_path / "remote.yaml"
    remote = {"class_path": "lit_vapo.rewards.remote.RemoteReward", "init_args": {"url": "http://there"}}
    path.write_text(yaml.safe_dump({"reward": remote}))
    with pytest.raises(ValueError, match=message):
        main(
            words(
                "calibrate",
                f"--config={path}",
                output=tmp_path / "new",
                reference__path=tiny_model_dir,
                data__tokenizer=tiny_model_dir,
                data__prompts=tiny_prompts_file,
            )
        )
    assert not (tmp_path / "new").exists()


def test_members_are_drawn(saved, chats, tiny_model_dir, tmp_path):
    replaced = {"data__tokenizer": tiny_model_dir, "data__preferences": chats, "data__max_length": 64}
    main(words("disagreement", reward=saved, output=tmp_path / "out", split="train", **replaced))
    found = json.loads((tmp_path / "out" / "disagreement.json").read_text())
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert found["num_responses"] == len(rows)
    # Each as the model's own template writes the whole conversation.
    source = load_reward(str(saved))
    source.prepare(None)
    texts = {r["place"]: r for r in rows if r["side"] == "rejected"}
    for place, row in list(texts.items())[:4]:
        i = int(re.search(r"line (\d+)", place)[1]) - 1
        pair = json.loads(Path(chats).read_text().splitlines()[i])
        asked = public.responses([public.Prompt(pair["rejected"][:-1])], [f"bad film {i}"])
        expected = source.score(asked).members[0]
        torch.testing.assert_close(
            torch.tensor([float(row[f"member_{k}"]) for k in range(3)]), expected, atol=1e-4, rtol=1e-4
        )


@pytest.fixture(scope="module")
def tested(saved, chats, tiny_model_dir, tmp_path_factory):
    """What `reward evaluate` writes."""
    folder = tmp_path_factory.mktemp("tested") / "out"
    replaced = {"data__tokenizer": tiny_model_dir, "data__preferences": chats, "data__max_length": 64}
    fractions = {"data__validation_fraction": 0.3, "data__test_fraction": 0.5, "data__preferences_ood": chats}
    main(words("evaluate", reward=saved, output=folder, **replaced, **fractions, data__batch_size=5))
    return folder


def test_any_rewards_are_tested_on_pairs(tested, saved, chats):
    names = ["evaluation.csv", "evaluation.json", "pairs.csv", "reliability.png", "risk_coverage.png", "sigma.png"]
    assert sorted(x.name for x in tested.iterdir()) == names
    found = json.loads((tested / "evaluation.json").read_text())
    assert found["margin_unit"] == "standard deviations of the reference's rewards"
    assert found["temperature"]["temperature"] > 0
    assert len(found["members"]) == 3
    assert {row["subset"] for row in found["subsets"]} == {"a", "b", "all"}
    assert found["verdict"]["sentences"]
    assert 0 <= found["ood_auroc"] <= 1
    with (tested / "pairs.csv").open() as file:
        pairs = list(csv.DictReader(file))
    assert found["num_pairs"] == len(pairs)
    # Margins of normalised rewards, member by member.
    source = load_reward(str(saved))
    source.prepare(None)
    margins = []
    for i, line in enumerate(Path(chats).read_text().splitlines()):
        pair = json.loads(line)
        prompts = [public.Prompt(pair[side][:-1]) for side in SIDES]
        members = source.score(public.responses(prompts, [f"{word} {i}" for word in SIDES.values()])).members
        margins.append(members[0] - members[1])
    known = torch.stack(margins)
    for pair in pairs:
        own = torch.tensor([float(pair[f"margin_member_{k}"]) for k in range(3)])
        assert (known - own).abs().max(1).values.min() < 1e-3
        assert float(pair["margin_mean"]) == pytest.approx(float(own.mean()), abs=1e-4)
        assert float(pair["margin_sigma"]) == pytest.approx(float(own.std()), abs=1e-3)
    right = sum(float(pair["margin_mean"]) > 0 for pair in pairs) / len(pairs)
    assert found["mean"]["accuracy"] == pytest.approx(right)


def test_our_own_ensemble_is_tested_as_its_stage_tests_it(
    reward_run, tiny_ensemble_dir, tiny_model_dir, tiny_preferences_file, stage_args, tmp_path
):
    main(stage_args("reward", "test", tmp_path / "run", f"--ckpt_path={helpers.last(reward_run)}"))
    options = yaml.safe_load((helpers.CONFIGS / "reward" / "tiny.yaml").read_text())["data"]
    options |= {"tokenizer": tiny_model_dir, "preferences": tiny_preferences_file}
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"data": options}))
    main(words("evaluate", f"--config={path}", ensemble=tiny_ensemble_dir, output=tmp_path / "out"))
    one = json.loads((tmp_path / "run" / "test" / "evaluation.json").read_text())
    two = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert one["num_pairs"] == two["num_pairs"]
    # A member's unit changes none of its preferences.
    assert [row["accuracy"] for row in one["members"]] == [row["accuracy"] for row in two["members"]]
    assert one["uncertainty"]["disagreement"] == two["uncertainty"]["disagreement"]


class Whole(RewardSource):
    """A source without separate members."""

    num_members = 2

    def __init__(self, value=1.0):
        super().__init__()
        self.value = value

    def score(self, responses):
        mean = torch.full((len(responses),), self.value)
        return RewardEstimate(mean, mean, None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, r"--reward: expected separate members, without which a margin has no variance, got Whole"),
        (float("nan"), r"chats.jsonl, line \d+: expected a finite score, got nan"),
    ],
)
def test_what_cannot_be_tested_is_refused(chats, tiny_model_dir, tmp_path, value, message):
    data = PreferenceDataModule(tiny_model_dir, preferences=chats, max_length=64)
    with pytest.raises(ValueError, match=message):
        evaluate(str(tmp_path / "out"), data, Whole(value))
    assert not (tmp_path / "out").exists()


def test_one_reward_has_no_sigma(models, chats, tiny_model_dir, tmp_path):
    from lit_vapo.models.pretrained import Pretrained
    from lit_vapo.rewards import PretrainedRewards

    data = PreferenceDataModule(tiny_model_dir, preferences=chats, max_length=64)
    evaluate(str(tmp_path / "out"), data, PretrainedRewards([Pretrained(models[0])]))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["margin_unit"] == "not calibrated"
    assert found["uncertainty"]["margin_sigma"] == 0


def test_pairs_that_end_with_no_text_are_named(saved, tiny_model_dir, tmp_path):
    call = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Review {i}"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad", "tool_calls": call}],
        }
        for i in range(4)
    ]
    path = helpers.write_jsonl(tmp_path / "calls.jsonl", rows)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls }}<eos>{% endfor %}"
    options = {"max_length": 128, "chat_template_kwargs": {"chat_template": template}, "validation_fraction": 0.5}
    data = PreferenceDataModule(tiny_model_dir, preferences=path, **options)
    with pytest.raises(ValueError, match=r"calls.jsonl, line \d: expected an answer that ends with a text, got \{"):
        evaluate(str(tmp_path / "out"), data, str(saved))


def test_a_test_of_nothing_is_refused(saved, chats, tiny_model_dir, tmp_path):
    data = PreferenceDataModule(tiny_model_dir, preferences=chats, max_length=64, validation_fraction=0.0)
    with pytest.raises(ValueError, match=r"data.preferences_test: expected pairs to test on .*, got none"):
        evaluate(str(tmp_path / "out"), data, str(saved))


# PPO.


@pytest.fixture(scope="module")
def run(stage_args, config, models, tmp_path_factory):
    """A run of PPO that is rewarded by public models, as a config names them."""
    folder = tmp_path_factory.mktemp("runs") / "ppo"
    main(stage_args("ppo", "fit", folder, f"--model={_model(config)}"))
    return folder


def _model(config):
    """The same options as a part of a stage's."""
    path = config.with_name("model.yaml")
    path.write_text(config.read_text())
    return path


def test_ppo_takes_public_models_from_a_config(run, stage_args, config, saved, tmp_path):
    held = torch.load(helpers.last(run), weights_only=True)
    reward = held["hyper_parameters"]["reward"]
    assert reward["class_path"] == KIND
    assert [x["path"] for x in reward["init_args"]["models"]] == [
        x["path"] for x in yaml.safe_load(config.read_text())["reward"]["init_args"]["models"]
    ]
    assert {k for k in held["state_dict"] if k.startswith("reward.")} == {
        f"reward.normaliser.{x}" for x in ("reward_loc", "reward_scale", "reference_variance", "calibrated")
    }
    # It is read again and scores equally: the same answers get the same rewards.
    for name in ("a", "b"):
        more = (f"--model={_model(config)}", f"--ckpt_path={helpers.last(run)}")
        main(stage_args("ppo", "validate", tmp_path / name, *more))
    one, two = (helpers.read_jsonl(tmp_path / name / "samples_val.jsonl") for name in ("a", "b"))
    fitted = helpers.read_jsonl(run / "samples_val.jsonl")
    assert one == two
    shared = {(r["prompt"], r["response"]): r["members"] for r in fitted}
    for row in one:
        known = shared.get((row["prompt"], row["response"]))
        assert known is None or known == pytest.approx(row["members"], abs=1e-4)
    assert any((r["prompt"], r["response"]) in shared for r in one)
    # A folder does as well.
    main(stage_args("ppo", "fit", tmp_path / "folder", model__reward=saved))


def test_the_page_shows_the_schemas_that_the_code_has():
    page = (helpers.CONFIGS.parent / "docs" / "rewards.md").read_text().partition("## RemoteReward")[2]
    request, answer, examples = re.findall(r"^```json\n(.*?)^```", page, re.M | re.S)
    for text, kind in ((request, protocol.Request), (answer, protocol.Answer)):
        known = kind.model_json_schema()
        shown = json.loads(text)
        assert shown["properties"].keys() == known["properties"].keys()
        assert shown["required"] == known["required"]
    row = json.loads(request)["properties"]["rows"]["items"]
    assert row["properties"].keys() == protocol.Row.model_fields.keys()
    assert row["required"] == [name for name, field in protocol.Row.model_fields.items() if field.is_required()]
    one, other = (line.encode() for line in examples.splitlines())
    assert protocol.read_request(one).rows[0].response == "Hi!"
    assert protocol.read_answer(other, 1, 3) == [[0.3, -0.1, 0.7]]


def test_a_policy_is_exported_without_its_rewards(run, tmp_path):
    main(["export", f"--checkpoint={helpers.last(run)}", f"--output={tmp_path / 'policy'}"])
    assert (tmp_path / "policy" / "README.md").is_file()
