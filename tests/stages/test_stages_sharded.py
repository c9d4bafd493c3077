"""Two processes that share a batch, or the weights too, train and log what one process does by itself."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import helpers
import ppo_helpers
import pytest
import several_worker
import sharded_worker
import strategy_table
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen3Config

from lit_vapo.cli import main
from lit_vapo.models.generation import Shaping
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.models.sharding import Sharing
from lit_vapo.models.tensor_parallel import check_split
from lit_vapo.rewards.members.lora import LoraEnsemble
from lit_vapo.stages.ppo.update import PPOUpdate, UpdateSettings
from lit_vapo.stages.reward.module import RewardModule
from lit_vapo.stages.sft.module import SFTModule
from lit_vapo.stages.strategy import check_strategy

TESTS = Path(sharded_worker.__file__).parent
# Kinds of PPO by strategy, and of the other stages; `make strategies` runs all of them, other tests what is quick.
ALL = os.environ.get("LIT_VAPO_ALL_STRATEGIES") == "1"
PPO = (
    strategy_table.PPO
    if ALL
    else {"ddp": ["lora_critic"], "fsdp2": ["lora_own", "full_own", "members"], "tensor": ["lora_critic"]}
)
OTHERS = strategy_table.OTHERS if ALL else ["sft_full", "heads_trained", "lora"]
CELLS = [(strategy, kind) for strategy, kinds in PPO.items() for kind in kinds]


def together(*command, nodes=1, processes=2):
    """Run processes by torchrun, on one machine that stands for one node, or for two of one process each."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run"]
    if nodes == 1:
        launches = [[*launch, "--standalone", f"--nproc_per_node={processes}"]]
    else:
        meet = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={helpers.free_port()}"]
        launches = [[*launch, *meet, f"--node_rank={rank}"] for rank in range(2)]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([*each, *map(str, command)], **options) for each in launches]
    said = [process.communicate(timeout=400)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)
    return said


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with three ensembles."""
    path = tmp_path_factory.mktemp("sharded")
    model = path / "model"
    tokenizer = helpers.tiny_tokenizer(model, chat_template=True)
    helpers.tiny_model(model, tokenizer, layers=3, num_key_value_heads=2)
    ppo_helpers.ensemble(path / "heads", str(model))
    ppo_helpers.ensemble(path / "inner", str(model), layer=2)
    ppo_helpers.saved_ensemble(path / "members", str(model))
    return path


@pytest.fixture(scope="module")
def shared(folders):
    """Runs PPO of all kinds in two processes; what one of them left, and what a single process leaves."""
    for strategy, kinds in PPO.items():
        together(TESTS / "sharded_worker.py", folders, strategy, *kinds, processes=4 if strategy == "both" else 2)

    def left(kind, strategy):
        if not (folders / f"{kind}_1_auto.pt").is_file():
            sharded_worker.run(kind, folders)
        names = (f"{kind}_1_auto.pt", f"{kind}_{4 if strategy == 'both' else 2}_{strategy}.pt")
        return [torch.load(folders / name, weights_only=True) for name in names]

    return left


def assert_same_figures(two, one, tolerance):
    assert len(two) == len(one) == 2
    for mine, theirs in zip(two, one, strict=True):
        # A token may lie on the edge of the clip range.
        mine, theirs = ({k: v for k, v in x.items() if "clip_fraction" not in k} for x in (mine, theirs))
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize(("strategy", "kind"), CELLS)
def test_processes_together_learn_and_log_what_one_does(shared, strategy, kind):
    one, two = shared(kind, strategy)
    assert two["sharded"] == (strategy != "ddp")
    # Quantised products are taken in less than float32, in which other shapes round otherwise.
    tolerance = 5e-3 if "bit" in kind else 1e-4
    assert_same_figures(two["logged"], one["logged"], tolerance)
    torch.testing.assert_close(two["weights"], one["weights"], atol=tolerance, rtol=0)
    assert any(abs(step["train/actor_grad_norm"]) > 1e-3 for step in one["logged"])
    assert len({len(row) for row in one["said"]}) > 1
    if "bit" not in kind:
        assert two["said"] == one["said"]


@pytest.fixture(scope="module")
def trained(folders):
    """The sft and reward stages in two processes that share the weights, and in one."""
    preferences = helpers.tiny_preferences(folders / "preferences.jsonl", 28)
    model = str(folders / "model")
    together(TESTS / "several_worker.py", model, preferences, folders, "fsdp2", *OTHERS)

    def left(kind):
        several_worker.run(kind, model, preferences, folders)
        return [torch.load(folders / f"{kind}_{world}.pt", weights_only=True) for world in (1, 2)]

    return left


@pytest.mark.parametrize("kind", OTHERS)
def test_other_stages_learn_sharded_what_they_learn_whole(trained, kind):
    one, two = trained(kind)
    # Where features are kept there is nothing to share.
    assert two["sharded"] == (kind != "heads")
    assert two["logged"] == pytest.approx(one["logged"], abs=1e-4)
    assert two["figures"] == pytest.approx(one["figures"], abs=1e-4, nan_ok=True)
    torch.testing.assert_close(two["weights"], one["weights"], atol=1e-4, rtol=0)


def command(folders, folder, *more):
    """`ppo fit` with numbers that do not depend on how prompts are dealt out."""
    return [
        *("ppo", "fit", "--config", helpers.CONFIGS / "ppo" / "tiny.yaml", "--model.base.path", folders / "model"),
        *("--model.reward", folders / "heads", "--data.tokenizer", folders / "model"),
        *("--data.prompts", folders / "cli.jsonl", "--trainer.default_root_dir", folder, "--trainer.max_epochs=2"),
        *("--model.generator=sharded_worker.SeededByPrompt", "--model.update.minibatches=1"),
        *("--trainer.logger=false", "--checkpoint.every_iterations=1", "--checkpoint.keep_last=10", *more),
    ]


def weights_of(folder):
    """The weights that an export of a run's end has."""
    out = folder.with_name(f"{folder.name}_export")
    main(["export", "--checkpoint", str(folder / "checkpoints" / "last.ckpt"), "--output", str(out)])
    return load_file(next(out.glob("*.safetensors")))


SHARDED = "lit_vapo.stages.strategy.ShardedStrategy"
SHARED = {
    "fsdp2": ["--trainer.strategy=fsdp2", "--data.batch_size=2"],
    "tensor": [f"--trainer.strategy={SHARDED}", "--trainer.strategy.tensor_parallel_size=2", "--data.batch_size=4"],
}


STOPS = [("fsdp2", False), ("fsdp2", True), ("tensor", True)]


@pytest.mark.parametrize(("strategy", "lora"), STOPS if ALL else STOPS[:1])
def test_two_nodes_go_on_after_a_stop_and_export_like_one_process(folders, tmp_path, strategy, lora):
    helpers.tiny_prompts(folders / "cli.jsonl", 16)
    whole, resumed, alone = (tmp_path / name for name in ("whole", "resumed", "alone"))
    shared = SHARED[strategy] if lora else [*SHARED[strategy], "--model.lora=null"]
    nodes = [*shared, "--trainer.num_nodes=2", "--trainer.devices=1"]
    together("-m", "lit_vapo", *command(folders, whole, *nodes), nodes=2)
    found = sorted((whole / "checkpoints").glob("iteration=*.ckpt"))
    assert len(found) >= 3
    # A run that was stopped in the middle has the files up to there.
    (resumed / "checkpoints").mkdir(parents=True)
    (resumed / "checkpoints" / found[1].name).write_bytes(found[1].read_bytes())
    together("-m", "lit_vapo", *command(folders, resumed, *shared, "--trainer.devices=2", "--resume"))
    first, second = (torch.load(x / "checkpoints" / "last.ckpt", weights_only=True) for x in (whole, resumed))
    assert first["global_step"] == second["global_step"]
    assert all((x / name).is_file() for x in (whole, resumed) for name in ("finished.json", "report.html"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(second[part], first[part], atol=0, rtol=0)
    main(list(map(str, command(folders, alone, "--data.batch_size=4", *([] if lora else ["--model.lora=null"])))))
    expected = weights_of(alone)
    assert not lora or any(x.abs().max() > 1e-3 for n, x in expected.items() if "lora_B" in n)
    torch.testing.assert_close(weights_of(whole), expected, atol=1e-4, rtol=0)


def test_a_strategy_that_would_train_apart_is_refused():
    with pytest.raises(ValueError, match=re.escape("trainer.strategy: expected `fsdp2` to shard weights")):
        check_strategy(ModelParallelStrategy())

    class DeepSpeedStrategy(ParallelStrategy):
        root_device = None

    DeepSpeedStrategy.__abstractmethods__ = frozenset()
    with pytest.raises(ValueError, match="expected one device, `ddp`, or `fsdp2` to shard weights, got DeepSpeed"):
        check_strategy(DeepSpeedStrategy())


def test_a_base_that_cannot_be_cut_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    module = SFTModule(Pretrained(str(tmp_path / "nowhere"), quantization="8bit"))
    monkeypatch.setattr("lit_vapo.stages.base.sharing_of", lambda strategy: sharing(1))
    monkeypatch.setattr("lit_vapo.stages.base.check_strategy", lambda strategy: strategy)
    module._trainer = SimpleNamespace(strategy=None)
    with pytest.raises(ValueError, match=re.escape("model.base.quantization: expected 4bit or null under fsdp2")):
        module.setup("fit")


def sharing(tensor):
    """Two processes that see other rows, and some that share products."""
    return Sharing(*(SimpleNamespace(size=lambda n=n: n) for n in (2, tensor)))


def test_what_cannot_be_split_is_refused_before_it_is_loaded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_vapo.stages.base.sharing_of", lambda strategy: sharing(2))
    monkeypatch.setattr("lit_vapo.stages.base.check_strategy", lambda strategy: strategy)
    gpt2 = tmp_path / "gpt2"
    helpers.tiny_model(gpt2, helpers.tiny_tokenizer(gpt2), "gpt2")
    lora = Lora(4, 16.0)
    refused = {
        "expected 1 for gpt2, got 2": SFTModule(Pretrained(str(gpt2)), lora),
        "expected 1 on a 4bit base, got 2": SFTModule(Pretrained(str(folders / "model"), quantization="4bit"), lora),
        "expected 1 in the reward stage, got 2": RewardModule(Pretrained(str(folders / "model")), LoraEnsemble(2)),
    }
    for message, module in refused.items():
        module._trainer = SimpleNamespace(strategy=None, datamodule=None)
        with pytest.raises(ValueError, match=re.escape(f"tensor_parallel_size: {message}")):
            module.setup("fit")
    heads = RewardModule(Pretrained(str(folders / "model")))
    heads._trainer = SimpleNamespace(strategy=None, datamodule=None)
    heads.setup("fit")


@pytest.mark.parametrize(
    ("config", "trains_all", "message"),
    [
        (
            LlamaConfig(num_attention_heads=4, num_key_value_heads=1),
            False,
            "divides the 1 num_key_value_heads of llama",
        ),
        (Qwen3Config(num_attention_heads=4, num_key_value_heads=2), True, "where all weights of qwen3 are trained"),
        (Qwen3Config(num_attention_heads=4, num_key_value_heads=2), False, None),
        (LlamaConfig(num_attention_heads=4, num_key_value_heads=2), True, None),
    ],
)
def test_heads_belong_to_one_process_and_so_do_their_norms(config, trains_all, message):
    if message is None:
        check_split(config, 2, trains_all)
        return
    with pytest.raises(ValueError, match=message):
        check_split(config, 2, trains_all)


def test_members_on_the_policy_s_base_are_refused_where_it_would_be_split(folders, monkeypatch):
    module = ppo_helpers.ppo_module(str(folders / "model"), str(folders / "members"))
    monkeypatch.setattr("lit_vapo.stages.base.sharing_of", lambda strategy: sharing(2))
    module._trainer = SimpleNamespace(strategy=None)
    with pytest.raises(ValueError, match="tensor_parallel_size: expected 1 for a LoraEnsemble on the policy's base"):
        module.configure_model()


def test_processes_exchange_gradients_with_the_last_microbatch_alone(folders):
    nets = ppo_helpers.networks(str(folders / "model"), str(folders / "heads"))
    experience = ppo_helpers.make_experience(nets, str(folders / "model"))
    module, order = ppo_helpers.LoneModule(), []

    @contextmanager
    def block():
        order.append("alone")
        yield

    module.trainer.strategy.block_backward_sync = block
    module.manual_backward = lambda loss: order.append("back") or loss.backward()
    settings = UpdateSettings(epochs=1, minibatches=1, micro_batch_tokens=20)
    PPOUpdate(module, nets, settings, Shaping()).run(experience, ppo_helpers.optimizer(nets))
    assert len(order) > 4
    assert order == ["alone", "back"] * (len(order) // 2) + ["back"]


def test_the_docs_show_what_was_tested():
    page = TESTS.parent / "docs" / "scaling.md"
    text = page.read_text(encoding="utf-8")
    shown = text.split("<!-- strategies:start -->\n")[1].split("<!-- strategies:end -->")[0]
    assert shown == strategy_table.table()


def test_the_docs_show_what_was_checked_on_a_gpu():
    spec = importlib.util.spec_from_file_location("checks", TESTS / "gpu" / "__main__.py")
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    record = json.loads(checks.RECORD.read_text(encoding="utf-8")) if checks.RECORD.is_file() else {}
    shown = checks.PAGE.read_text(encoding="utf-8").split(checks.START)[1].split(checks.END)[0]
    assert shown == checks.table(record)
