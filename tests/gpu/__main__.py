"""Check on GPUs what other tests check on a CPU, and write what came of it: `python -m tests.gpu` (`make gpu`).

Each check trains PPO for two iterations on a small model. It *passed* if nothing went wrong and weights moved.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers
import ppo_helpers
import torch

from lit_vapo.models.generation import Sampling
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Lora, Pretrained
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.update import UpdateSettings

TESTS = Path(__file__).parents[1]
PAGE, RECORD = TESTS.parent / "docs" / "scaling.md", TESTS.parent / "docs" / "evidence" / "gpu.json"
START, END = "<!-- gpu:start -->\n", "<!-- gpu:end -->"
NOT_RUN = "not run"


def small_model(folder):
    """A Llama of two million parameters, with heads of a width that flash attention knows."""
    model = folder / "model"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    helpers.tiny_model(model, helpers.tiny_tokenizer(model, chat_template=True), layers=4, **sizes)
    head = ppo_helpers.HeadEnsemble(3)
    head.build(256)
    head.calibrate(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)))
    spec = ppo_helpers.FeatureSpec(Pretrained(str(model)), None, "last", [])
    ppo_helpers.RewardModel(spec, head, None).save_pretrained(folder / "reward")
    return folder


def train(folder, accelerator, lora=True, precision="bf16-mixed", base=None, **trainer):
    """Two iterations of PPO; the module."""
    module = PPOModule(
        Pretrained(str(folder / "model"), **(base or {})),
        str(folder / "reward"),
        lora=Lora(4, 16.0) if lora else None,
        sampling=Sampling(32),
        update=UpdateSettings(epochs=1, minibatches=2),
        learning_rate=1e-3,
    )
    data = ppo_helpers.prompt_data(str(folder / "model"), folder)
    options = {"accelerator": accelerator, "precision": precision, "max_epochs": 1, "limit_train_batches": 2, **trainer}
    torch.manual_seed(0)
    run = ppo_helpers.trainer(folder / "run", **options)
    run.fit(module, data)
    norm = float(run.callback_metrics["train/actor_grad_norm"])
    if not 0 < norm < float("inf"):
        raise AssertionError(f"expected gradients, got a norm of {norm}")
    return module


def needs(package):
    """Why a check cannot be run that needs a package, if so."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def peak(folder, checkpointing):
    """Bytes that a pass forward takes at its peak, over what was there before."""
    base = Pretrained(str(folder / "model"), gradient_checkpointing=checkpointing)
    policy = Policy(base, None, keep_reference=False).cuda()
    ids, lengths = torch.full((32, 256), 5, device="cuda"), torch.full((32,), 256, device="cuda")
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    policy.hidden("actor", ids, lengths).last.sum().backward()
    return torch.cuda.max_memory_allocated() - held


def recomputed(folder, accelerator):
    """Gradient checkpointing takes less memory."""
    if accelerator == "cpu":
        return
    whole, less = (peak(folder, checkpointing) for checkpointing in (False, True))
    if not less < whole:
        raise AssertionError(f"expected less than {whole} bytes, got {less}")


def together(strategy):
    """A check of two processes that run a strategy."""

    def check(folder, accelerator):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "tests.gpu",
        ]
        environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
        command += ["--strategy", strategy, "--folder", str(folder), "--accelerator", accelerator]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise AssertionError(done.stderr.strip().splitlines()[-1])

    return check


def vllm(folder, accelerator):
    """The tests of a real vLLM server."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(TESTS / "models" / "test_models_vllm_real.py")]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise AssertionError(done.stdout.strip().splitlines()[-1])


def has_vllm():
    """Why vLLM cannot be asked, if so."""
    return None if os.environ.get("LIT_VAPO_VLLM") else "LIT_VAPO_VLLM names no interpreter with vLLM"


def two_devices(accelerator):
    """Why two processes cannot be run, if so."""
    count = 2 if accelerator == "cpu" else torch.cuda.device_count()
    return None if count > 1 else f"{count} GPU"


def flash(folder, accelerator):
    """Flash attention, in the data type that it needs."""
    train(folder, accelerator, base={"dtype": "bfloat16", "attn_implementation": "flash_attention_2"})


# What is checked, how, and why it cannot be where it cannot.
CHECKS = {
    "float32": (lambda f, a: train(f, a, precision="32-true"), lambda a: None),
    "bf16-mixed, LoRA": (train, lambda a: None),
    "bf16-mixed, all weights": (lambda f, a: train(f, a, lora=False), lambda a: None),
    "8-bit base": (lambda f, a: train(f, a, base={"quantization": "8bit"}), lambda a: needs("bitsandbytes")),
    "4-bit base": (lambda f, a: train(f, a, base={"quantization": "4bit"}), lambda a: needs("bitsandbytes")),
    "gradient checkpointing takes less memory": (recomputed, lambda a: None),
    "flash attention 2": (flash, lambda a: needs("flash_attn")),
    "`ddp`, two GPUs": (together("ddp"), two_devices),
    "`fsdp2`, two GPUs": (together("fsdp2"), two_devices),
    "tensor parallel, two GPUs": (together("tensor"), two_devices),
    "vLLM": (vllm, lambda a: has_vllm()),
}


def run_checks(accelerator, chosen):
    """What came of each check."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = small_model(Path(scratch))
        for name in chosen:
            check, hindrance = CHECKS[name]
            reason, started = hindrance(accelerator), time.monotonic()
            if reason is None:
                try:
                    check(folder, accelerator)
                    found[name] = f"passed ({time.monotonic() - started:.0f} s)"
                except Exception as error:
                    found[name] = f"**failed**: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            else:
                found[name] = f"{NOT_RUN}: {reason}"
            print(f"{name}: {found[name]}", flush=True)
    return found


def table(record):
    """The record in Markdown; every row *not run* without one."""
    found = record.get("checks", {})
    machine = f"{record['card']}, torch {record['torch']}, {record['date']}" if record else "no GPU"
    lines = [
        f"| check | {machine} |",
        "| --- | --- |",
        *(f"| {name} | {found.get(name, NOT_RUN)} |" for name in CHECKS),
    ]
    return "\n".join(lines) + "\n"


def share(strategy, folder, accelerator):
    """One of two processes."""
    from sharded_worker import STRATEGIES

    chosen = STRATEGIES.get(strategy, (2, lambda: strategy))[1]()
    train(folder, accelerator, devices=2, strategy=chosen)


def main():
    """Run the checks, and write the table into the docs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="gpu", help="`cpu` tries the checks themselves, and writes nothing")
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), help="checks to run (default: all)")
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.strategy is not None:
        share(args.strategy, args.folder, args.accelerator)
        return
    if args.accelerator == "gpu" and not torch.cuda.is_available():
        print("make gpu: no GPU here; the docs keep what they say")
        return
    found = run_checks(args.accelerator, args.only or list(CHECKS))
    if args.accelerator == "gpu":
        card = torch.cuda.get_device_name()
        date = datetime.now(UTC).date().isoformat()
        record = {"card": card, "torch": torch.__version__, "date": date, "checks": found}
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(START)
        PAGE.write_text(before + START + table(record) + END + rest.split(END)[1], encoding="utf-8")
    sys.exit(any("failed" in outcome for outcome in found.values()))


if __name__ == "__main__":
    main()
