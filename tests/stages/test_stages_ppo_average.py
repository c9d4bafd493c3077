"""The averaged policy: what it is, who sees it, and that a run goes on from it exactly."""

import ppo_helpers
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from ppo_helpers import fit_ppo, ppo_module, prompt_data
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lit_vapo.commands.export import export
from lit_vapo.models.averaging import WeightAverage
from lit_vapo.stages.ppo.evaluation import AVERAGED

pytestmark = [pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")]


@pytest.fixture(scope="module")
def reward(tiny_model_dir, tmp_path_factory):
    return ppo_helpers.ensemble(tmp_path_factory.mktemp("ppo") / "ensemble", tiny_model_dir)


def weights(module):
    return [x.detach().clone() for x in module.networks.actor_parameters()]


def same(one, other, **kwargs):
    kwargs = kwargs or {"atol": 0, "rtol": 0}
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **kwargs)


def fitted(reward, model, folder, ckpt_path=None, callbacks=(), **kwargs):
    """A run of two iterations an epoch, and what callbacks keep of it."""
    folder.mkdir(exist_ok=True)
    options = {key: kwargs.pop(key) for key in ("max_epochs", "limit_val_batches") if key in kwargs}
    module = ppo_module(model, reward, **{"ema_decay": 0.75, **kwargs})
    data = prompt_data(model, folder, validation_fraction=0.25)
    keep = ModelCheckpoint(folder / "ckpt", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    options = {"limit_train_batches": 2, "enable_checkpointing": True, **options}
    module.rows = fit_ppo(module, data, folder, ckpt_path, callbacks=[keep, *callbacks], **options)
    return module


class Course(ppo_helpers.Recorder):
    """Keeps the policy's weights after each iteration."""

    def on_train_start(self, trainer, pl_module):
        self.weights = [weights(pl_module)]

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(weights(pl_module))


def test_an_average_forgets_by_its_decay():
    x = nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage(lambda: [x], 0.75)
    for value in (5.0, -3.0):
        x.data.fill_(value)
        average.update()
    # 1 → 0.75·1 + 0.25·5 = 2 → 0.75·2 − 0.25·3 = 0.75.
    assert average.weights[0].item() == pytest.approx(0.75, abs=1e-7)
    average.restart()
    assert average.weights[0].item() == -3.0


def test_own_weights_come_back_whatever_happens_in_between():
    x = nn.Parameter(torch.rand(5))
    average = WeightAverage(lambda: [x], 0.9)
    mean = average.weights[0].detach().clone()
    x.data.add_(1)
    own = x.detach().clone()

    def fail():
        with average.in_place():
            torch.testing.assert_close(x.detach(), mean, atol=0, rtol=0)
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail()
    torch.testing.assert_close(x.detach(), own, atol=0, rtol=0)
    torch.testing.assert_close(average.weights[0].detach(), mean, atol=0, rtol=0)
    assert not average.weights[0].requires_grad


@pytest.mark.parametrize("lora", [True, False])
def test_the_average_is_that_of_the_weights_after_each_iteration(tiny_model_dir, reward, tmp_path, lora):
    course = Course()
    module = fitted(reward, tiny_model_dir, tmp_path, callbacks=[course], **({} if lora else {"lora": None}))
    first, one, two = course.weights
    expected = [0.75 * (0.75 * a + 0.25 * b) + 0.25 * c for a, b, c in zip(first, one, two, strict=True)]
    same([x.detach() for x in module.average.weights], expected, atol=1e-6, rtol=1e-5)
    same(weights(module), two)


def test_learning_does_not_see_the_average(tiny_model_dir, reward, tmp_path):
    with_it = fitted(reward, tiny_model_dir, tmp_path / "a", limit_val_batches=1)
    without = fitted(reward, tiny_model_dir, tmp_path / "b", limit_val_batches=1, ema_decay=None)
    same(weights(with_it), weights(without))
    for one, other in zip(with_it.rows, without.rows, strict=True):
        learned = {k for k in one if k.startswith("train/") and "second" not in k}
        assert {k: one[k] for k in learned} == {k: other[k] for k in learned}


def test_evaluation_and_export_are_of_the_average(tiny_model_dir, reward, tmp_path):
    module = fitted(reward, tiny_model_dir, tmp_path, max_epochs=2, learning_rate=0.05)
    checkpoint = str(tmp_path / "ckpt" / "epoch=1.ckpt")
    export(checkpoint, str(tmp_path / "policy"))
    found = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    names = [n for n, _ in module.networks.policy.lm.named_parameters() if ".actor." in n and "lora_" in n]
    for name, average in zip(names, module.average.weights, strict=True):
        torch.testing.assert_close(found[name.replace(".actor.", ".")], average.detach(), atol=0, rtol=0)
    same(weights(module), [x.detach() for x in module.networks.actor_parameters()])
    seen = []
    own = module.average.in_place

    def spy():
        seen.append("average")
        return own()

    module.average.in_place = spy
    data = prompt_data(tiny_model_dir, tmp_path, validation_fraction=0.25)
    answers = ppo_helpers.trainer(tmp_path / "val").validate(module, data)[0]
    assert seen
    plain = ppo_module(tiny_model_dir, reward, policy=str(tmp_path / "policy"), lora=None)
    expected = ppo_helpers.trainer(tmp_path / "plain").validate(plain, data)[0]
    assert answers["val/kl_k3"] == pytest.approx(expected["val/kl_k3"], abs=1e-6)
    assert answers["val/kl_k3"] > 0
    raw = fitted(reward, tiny_model_dir, tmp_path / "raw", checkpoint, ema_decay=None, max_epochs=2)
    other = ppo_helpers.trainer(tmp_path / "other").validate(raw, data)[0]
    assert abs(other["val/kl_k3"] - answers["val/kl_k3"]) > 1e-3


def test_a_merged_export_is_of_the_average(tiny_model_dir, reward, tmp_path):
    fitted(reward, tiny_model_dir, tmp_path, learning_rate=0.05)
    checkpoint = str(tmp_path / "ckpt" / "epoch=0.ckpt")
    export(checkpoint, str(tmp_path / "adapter"))
    export(checkpoint, str(tmp_path / "whole"), merge=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_a_resumed_run_has_the_same_average(tiny_model_dir, reward, tmp_path):
    whole = fitted(reward, tiny_model_dir, tmp_path / "whole", max_epochs=2)
    path = tmp_path / "whole" / "ckpt" / "epoch=0.ckpt"
    resumed = fitted(reward, tiny_model_dir, tmp_path / "again", path, max_epochs=2)
    same([x.detach() for x in resumed.average.weights], [x.detach() for x in whole.average.weights])
    same(weights(resumed), weights(whole))


def test_a_run_may_begin_an_average_and_leave_one_out(tiny_model_dir, reward, tmp_path, capsys):
    first = fitted(reward, tiny_model_dir, tmp_path / "without", ema_decay=None)
    path = tmp_path / "without" / "ckpt" / "epoch=0.ckpt"
    module = ppo_module(tiny_model_dir, reward, ema_decay=0.75)
    module.configure_model()
    checkpoint = torch.load(path, weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    same([x.detach() for x in module.average.weights], weights(first))
    again = fitted(reward, tiny_model_dir, tmp_path / "with", path, max_epochs=2)
    left = fitted(reward, tiny_model_dir, tmp_path / "left", tmp_path / "with" / "ckpt" / "epoch=1.ckpt", max_epochs=3,
        ema_decay=None)  # fmt: skip
    assert again.average is not None
    assert left.average is None
    assert left.rows


def test_versions_of_averaged_weights_are_their_own(tiny_model_dir, reward, tmp_path):
    asked = []
    module = ppo_module(tiny_model_dir, reward, ema_decay=0.75)
    data = prompt_data(tiny_model_dir, tmp_path, validation_fraction=0.25)
    start = module.start

    def started():
        start()
        sync = module.maker.generator.sync
        module.maker.generator.sync = lambda policy, role, version: (
            asked.append((role, version)),
            sync(policy, role, version),
        )

    module.start = started
    fit_ppo(module, data, tmp_path, limit_train_batches=1, limit_val_batches=1)
    assert ("actor", 0) in asked
    assert ("actor", 4 + AVERAGED) in asked
    assert ("actor", 4) not in asked


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_out_of_range_is_refused(tiny_model_dir, reward, decay):
    with pytest.raises(ValueError, match=r"model.ema_decay: expected a number between 0 and 1, got"):
        ppo_module(tiny_model_dir, reward, ema_decay=decay)
