"""From a checkpoint to a folder and back: an exported policy says, scores and learns what the run's own did."""

import csv
import json
import re
import shutil

import pytest
import torch
import yaml
from helpers import last, tiny_model, tiny_tokenizer
from ppo_helpers import ensemble, ppo_module, state
from transformers import AutoModelForCausalLM, GenerationConfig

from lit_vapo.cli import main
from lit_vapo.models.critic import CriticSpec
from lit_vapo.models.digests import seal
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.stages.ppo.module import PPOModule


def figures(folder, prefix):
    """What a run logged below a prefix."""
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {k: float(v) for row in rows for k, v in row.items() if k.startswith(prefix) and v}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, ppo_run):
    """The policy of the shared run: as an adapter, or merged."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("policies") / kind
            options = ["--merge=true"] if kind == "merged" else []
            main(["export", f"--checkpoint={last(ppo_run)}", f"--output={folder}", *options])
            made[kind] = folder
        return made[kind]

    return get


@pytest.fixture
def evaluate(stage_args, tiny_ensemble_dir, tmp_path):
    """Figures of `ppo test` or `ppo validate` by the command line."""

    def call(command, name, *options):
        main(stage_args("ppo", command, tmp_path / name, *options, model__reward=tiny_ensemble_dir))
        return figures(tmp_path / name, "test" if command == "test" else "val/")

    return call


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_an_exported_policy_gives_the_figures_of_its_checkpoint(ppo_run, exported, evaluate):
    expected = evaluate("test", "checkpoint", f"--ckpt_path={last(ppo_run)}")
    assert expected["test/kl_k3"] > 1e-6
    assert expected["test_reference/kl_k3"] == 0
    adapter = evaluate("test", "adapter", f"--model.policy={exported('adapter')}")
    assert adapter == pytest.approx(expected, rel=1e-6, abs=1e-9)
    # Sums in another order: W + BA in place of Wx + B(Ax).
    merged = evaluate("test", "merged", f"--model.policy={exported('merged')}")
    assert merged == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("options", [[], ["--model.lora=null"]])
def test_it_gives_the_figures_of_the_run_s_last_evaluation(ppo_run, exported, evaluate, options):
    expected = figures(ppo_run, "val/")
    assert len(expected) > 10
    assert evaluate("validate", "again", f"--model.policy={exported('adapter')}", *options) == pytest.approx(
        expected, rel=1e-6, abs=1e-9
    )


def test_the_card_tells_what_the_checkpoint_held(ppo_run, exported, tiny_model_dir, capsys):
    card = (exported("adapter") / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == tiny_model_dir
    assert (header["library_name"], header["base_model_relation"]) == ("peft", "adapter")
    for key, value in figures(ppo_run, "val/").items():
        assert f"| {key} | {value:.6g} |" in card
    assert "| KL coefficient at the end | 0.05 |" in card
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.S)[1])
    assert settings["lora"]["rank"] == 4
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], {})
    assert "Once upon a time" in capsys.readouterr().out
    merged = (exported("merged") / "README.md").read_text()
    assert yaml.safe_load(merged.split("---\n")[1])["library_name"] == "transformers"
    exec(re.search(r"```python\n(.*?)```", merged, re.S)[1], {})


def test_the_ensemble_s_card_works(tiny_ensemble_dir, reward_run, capsys):
    card = (tiny_ensemble_dir / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["tags"][-1] == "HeadEnsemble"
    for key, value in figures(reward_run, "val/").items():
        assert f"| {key} | {value:.6g} |" in card
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], {})
    assert "tensor" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_generation_settings_are_those_of_training(exported, kind):
    config = GenerationConfig.from_pretrained(exported(kind))
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 1.0, 0, 1.0)
    assert config.max_new_tokens == 6
    assert 0 in config.eos_token_id  # <eos>


def test_figures_are_plain_numbers(ppo_run):
    held = torch.load(last(ppo_run), weights_only=True)["lit_vapo_figures"]
    assert held["val/kl_k3"] == pytest.approx(figures(ppo_run, "val/")["val/kl_k3"])
    assert all(type(v) is float for v in held.values())


def moved(module):
    """Weights as after a training: every trained one is somewhere of its own."""
    with torch.no_grad():
        for i, p in enumerate(p for p in module.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    return module


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ensemble(tmp_path_factory.mktemp("reward") / "ensemble", tiny_model_dir)


TWO_LAYERS = Lora(4, 16.0, ["q_proj", "v_proj"], 1)


@pytest.mark.parametrize(
    ("lora", "trunk"),
    [(TWO_LAYERS, "reference"), (TWO_LAYERS, "own"), (TWO_LAYERS, "lora"), (None, "reference"), (None, "own")],
)
def test_training_goes_on_from_policy_and_critic(tiny_model_dir, reward, tmp_path, lora, trunk):
    first = ppo_module(tiny_model_dir, reward, lora=lora, critic=CriticSpec(trunk))
    first.configure_model()
    moved(first).export(tmp_path / "policy")
    again = ppo_module(tiny_model_dir, reward, lora=None, critic=CriticSpec(trunk), policy=str(tmp_path / "policy"))
    again.configure_model()
    assert again.lora == lora
    assert again.networks.critic_start == str(tmp_path / "policy" / "critic")
    expected, found = state(first), state(again)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=0, rtol=0, msg=name)
    # An ensemble that is calibrated at the start does not take the critic away.
    again.networks.warm_start_critic(again.reward.linear_mean())
    torch.testing.assert_close(again.networks.critic.value_head.weight, first.networks.critic.value_head.weight)


def test_a_critic_that_reads_something_else_stays(tiny_model_dir, reward, tmp_path):
    first = ppo_module(tiny_model_dir, reward)
    first.configure_model()
    moved(first).export(tmp_path / "policy")
    again = ppo_module(tiny_model_dir, reward, critic=CriticSpec("own"), policy=str(tmp_path / "policy"))
    again.configure_model()
    assert again.networks.critic_start == "the mean reward"
    shutil.rmtree(tmp_path / "policy" / "critic")
    seal(tmp_path / "policy")
    again = ppo_module(tiny_model_dir, reward, critic=CriticSpec(warm_start=False), policy=str(tmp_path / "policy"))
    again.configure_model()
    assert again.networks.critic_start == "zeros"


def test_a_whole_policy_keeps_the_base_as_its_reference(tiny_model_dir, reward, exported):
    for lora in (None, Lora(4, 16.0)):
        module = ppo_module(tiny_model_dir, reward, lora=lora, policy=str(exported("merged")))
        module.configure_model()
        policy = module.networks.policy
        merged, base = (AutoModelForCausalLM.from_pretrained(x) for x in (exported("merged"), tiny_model_dir))
        ids = torch.arange(5, 12)[None]
        for role, lm in (("actor", merged), ("reference", base)):
            with torch.no_grad(), policy.acting_as(role) as acting:
                torch.testing.assert_close(acting(ids).logits, lm(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.fixture
def light(monkeypatch, exported):
    """Nothing heavy may be loaded (after the exports, which a test may ask for later)."""
    for kind in ("adapter", "merged"):
        exported(kind)

    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for name in ("models.policy.load_causal_lm", "rewards.reward_model.load_backbone", "models.critic.load_backbone"):
        monkeypatch.setattr(f"lit_vapo.{name}", forbidden)


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    seal(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, r"model.policy: expected a folder with an exported policy .* got '.*policy' with no folder"),
        (lambda f: (f / "adapter_config.json").unlink(), r"exported policy \(adapter_config.json .*, got '.*policy'"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"expected adapter_model.safetensors .* in '.*policy'"),
        (lambda f: edit(f, base_model_name_or_path="other/model"), r"expected an adapter of model.base, '.*model', got "
         r"one of 'other/model' in '.*policy'"),
        (lambda f: edit(f, use_dora=True), r"expected a plain LoRA adapter, got peft_type 'LORA' with \['use_dora'\]"),
        (lambda f: edit(f, peft_type="VERA"), r"expected a plain LoRA adapter, got peft_type 'VERA'"),
        (lambda f: edit(f, layers_to_transform=[0]), r"expected an adapter of the topmost layers of 2, got .*\[0\]"),
        (lambda f: edit(f, r=8), r"model.lora: expected the adapter of model.policy .*rank=8.*, or null .*got.*rank=4"),
        (lambda f: edit(f, lora_alpha=1), r"model.lora: expected the adapter of model.policy .*alpha=1.0.* got Lora"),
        (lambda f: edit(f, layers_to_transform=[1]), r"model.lora: expected .*top_layers=1\), or null .*=None"),
    ],
)  # fmt: skip
def test_a_policy_that_does_not_fit_is_refused_at_once(
    exported, tiny_model_dir, reward, tmp_path, light, spoil, message
):
    shutil.copytree(exported("adapter"), tmp_path / "policy")
    spoil(tmp_path / "policy")
    # As another program would have written it.
    (tmp_path / "policy" / "digests.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=message):
        ppo_module(tiny_model_dir, reward, lora=Lora(4), policy=str(tmp_path / "policy"))


def test_a_missing_policy_is_refused_by_the_command(evaluate, light):
    with pytest.raises(ValueError, match=r"model.policy: expected a folder with an exported policy .* got 'nowhere'"):
        evaluate("test", "run", "--model.policy=nowhere")


def test_other_targets_than_the_folder_s_are_refused(exported, tiny_model_dir, reward, light):
    with pytest.raises(ValueError, match=r"model.lora: expected the adapter of model.policy .*got .*\['q_proj'\]"):
        ppo_module(tiny_model_dir, reward, lora=Lora(4, 32.0, ["q_proj"]), policy=str(exported("adapter")))


def test_a_whole_policy_of_another_shape_is_refused(exported, tmp_path, reward, light):
    wide = tiny_model(tmp_path / "wide", tiny_tokenizer(tmp_path / "wide"), hidden_size=64)
    with pytest.raises(ValueError, match=r"expected a model of the same hidden_size as model.base .* 64, got 32 in"):
        ppo_module(wide, reward, policy=str(exported("merged")))


def test_an_adapter_of_other_layers_is_refused_on_loading(exported, tiny_model_dir, reward, tmp_path):
    shutil.copytree(exported("adapter"), tmp_path / "policy")
    edit(tmp_path / "policy", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"expected an adapter of this base, .*lora_A.weight of shape none, got \(4, "):
        ppo_module(tiny_model_dir, reward, lora=None, policy=str(tmp_path / "policy")).configure_model()


def test_a_quantised_base_is_not_merged_and_leaves_nothing(tiny_model_dir, reward, tmp_path):
    module = PPOModule(Pretrained(tiny_model_dir, quantization="8bit"), reward, lora=Lora(4))
    module.configure_model()
    with pytest.raises(ValueError, match=r"merge: expected adapters of an unquantised base, got those of a 8bit base"):
        module.export(tmp_path / "merged", merge=True)
    assert not list(tmp_path.iterdir())


def test_merging_is_for_policies(reward_run, tmp_path):
    with pytest.raises(ValueError, match=r"--merge: expected a checkpoint of the ppo stage, got one of 'reward'"):
        main(["export", f"--checkpoint={last(reward_run)}", f"--output={tmp_path / 'x'}", "--merge=true"])
