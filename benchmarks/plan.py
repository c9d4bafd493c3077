"""Checks `lit-vapo plan` against measured peaks of memory, on a CPU, or on a GPU where there is one.

    python benchmarks/plan.py --output docs/evidence/plan.json
    python benchmarks/plan.py --hidden 1024 --layers 24 --output docs/evidence/plan_gpu.json

Each cell runs a stage on a random Llama in a process of its own and measures the peak of each phase in its last
iteration (`workers/plan_job.py`). The plan is made with the same options. Prompts have all the same length and
responses never end, so that both speak of the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_vapo.commands.plan_settings import read_settings
from lit_vapo.models.weights import quiet

WORKER = Path(__file__).parent / "workers" / "plan_job.py"
PROMPT, NEW, ROWS, VOCABULARY = 96, 32, 8, 8192
PPO = [
    "--model.objective=MeanReward",
    "--model.reward=FunctionReward",
    "--model.reward.init_args.function=workers.plan_job.constant_rewards",
    f"--model.sampling.max_new_tokens={NEW}",
    "--model.sampling.stop_token_ids=[]",
    "--model.update.epochs=1",
    "--model.update.minibatches=2",
    "--model.update.micro_batch_tokens=256",
    "--data.validation_fraction=0",
    f"--data.batch_size={ROWS}",
    f"--data.max_prompt_length={PROMPT}",
]
# Both sides of a pair have as many tokens as may be.
PAIRS = ["--data.validation_fraction=0", f"--data.batch_size={ROWS // 4}", f"--data.max_length={PROMPT + NEW}"]
SAVING = "--model.base.gradient_checkpointing=true"
TRAINER = [
    "--trainer.accelerator=auto",
    "--trainer.devices=1",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=0",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
HELD = {
    "fp32": ["--trainer.precision=32-true"],
    "bf16": ["--trainer.precision=bf16-mixed", "--model.base.dtype=bfloat16"],
    "8-bit": ["--trainer.precision=bf16-mixed", "--model.base.dtype=bfloat16", "--model.base.quantization=8bit"],
}


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """A random Llama, and a tokenizer of words."""
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"</s>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256 or 1,
        tie_word_embeddings=True,
        eos_token_id=VOCABULARY - 1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_data(folder: Path) -> dict[str, str]:
    """Prompts of exactly so many words, pairs on them, and pairs that are nearly all response; as options by stage."""
    prompt = [" ".join(f"w{(7 * i + j) % 5000}" for j in range(PROMPT)) for i in range(4 * ROWS)]
    answers = [" ".join(f"w{(11 * i + j) % 5000}" for j in range(NEW - 1)) for i in range(8 * ROWS)]
    prompts, pairs = folder / "prompts.jsonl", folder / "pairs.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompt))
    rows = [{"prompt": p + " ", "chosen": answers[2 * i], "rejected": answers[2 * i + 1]} for i, p in enumerate(prompt)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = folder / "long.jsonl"
    rows = [{"prompt": "w1 ", "chosen": p + " " + answers[i], "rejected": p} for i, p in enumerate(prompt)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "ppo": f"--data.prompts={prompts}",
        "reward": f"--data.preferences={pairs}",
        "sft": f"--data.preferences={long}",
    }


def cells() -> list[tuple[str, str, list[str]]]:
    """Name, stage and options of each cell."""
    found = []
    for (held, options), (kind, lora), saving in product(
        HELD.items(), {"LoRA": ["--model.lora.rank=16"], "full": []}.items(), (False, True)
    ):
        name = f"ppo, {kind}, {held}{', checkpointing' if saving else ''}"
        more = [SAVING] if saving else []
        found.append((name, "ppo", [*PPO, *options, *lora, *more]))
    own = ["--model.critic.trunk=own", "--model.lora.rank=16"]
    adapted = ["--model.critic.trunk=lora", "--model.lora.rank=16"]
    found += [
        ("ppo, LoRA, fp32, own critic", "ppo", [*PPO, *HELD["fp32"], *own]),
        ("ppo, LoRA, bf16, critic of adapters", "ppo", [*PPO, *HELD["bf16"], *adapted]),
    ]
    for name, options in {
        "LoraEnsemble, 8-bit": ["--model.head=LoraEnsemble", "--model.head.num_members=2", *HELD["8-bit"]],
        "LoraEnsemble, bf16, checkpointing": [
            "--model.head=LoraEnsemble",
            "--model.head.num_members=2",
            *HELD["bf16"],
            SAVING,
        ],
        "FullEnsemble of 2, fp32": ["--model.head=FullEnsemble", "--model.head.num_members=2", *HELD["fp32"]],
        "heads and backbone, bf16, checkpointing": ["--model.freeze_backbone=false", *HELD["bf16"], SAVING],
    }.items():
        found.append((f"reward, {name}", "reward", [*PAIRS, "--model.layer=null", *options]))
    for name, options in {
        "full, fp32": HELD["fp32"],
        "LoRA, bf16, checkpointing": [*HELD["bf16"], "--model.lora.rank=16", SAVING],
    }.items():
        found.append((f"sft, {name}", "sft", [*PAIRS, *options]))
    return found


def measure(stage: str, words: list[str]) -> dict[str, Any]:
    """What a process of its own measures."""
    paths = [str(Path(__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), stage, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(record: dict[str, Any]) -> str:
    """The table of docs/plan.md."""
    lines = ["| run | phase | measured, MB | planned, MB | planned / measured |", "| --- | --- | --- | --- | --- |"]
    for row in record["cells"]:
        ratio = row["planned"] / row["measured"]
        sizes = f"{row['measured'] / 1e6:.1f} | {row['planned'] / 1e6:.1f}"
        lines.append(f"| {row['cell']} | {row['phase']} | {sizes} | {ratio:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, plan, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default="", help="cells whose names hold this")
    parser.add_argument("--measured", type=Path, help="a record whose measurements are taken, to plan anew alone")
    options = parser.parse_args()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    former: dict[str, Any] = (
        json.loads(options.measured.read_text()) if options.measured else {"device": card, "cells": ()}
    )
    card, known = former["device"], {}
    for row in former["cells"]:
        known.setdefault(row["cell"], {})[row["phase"]] = row["measured"]
    quiet()
    sys.path.insert(0, str(Path(__file__).parent))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model", options.hidden, options.layers)
        data = make_data(folder)
        base = [f"--model.base.path={folder / 'model'}", f"--data.tokenizer={folder / 'model'}"]
        for number, (name, stage, words) in enumerate(c for c in cells() if options.only in c[0]):
            run = [*TRAINER, *base, data[stage], f"--trainer.default_root_dir={folder / str(number)}", *words]
            plan = read_settings(stage, run, on_cpu=card == "cpu").plan()
            for phase, peak in (known.get(name) or measure(stage, run)["phases"]).items():
                planned = sum(plan.phases[phase].values())
                rows.append({"cell": name, "phase": phase, "measured": peak, "planned": round(planned)})
                print(f"{name:36} {phase:9} {peak / 1e6:8.1f} {planned / 1e6:8.1f} {planned / peak:6.3f}", flush=True)
    worst = max(abs(row["planned"] / row["measured"] - 1) for row in rows)
    print(f"worst: {worst:.1%}")
    if options.output:
        record = {
            "device": card,
            "hidden": options.hidden,
            "layers": options.layers,
            "vocabulary": VOCABULARY,
            "cells": rows,
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
