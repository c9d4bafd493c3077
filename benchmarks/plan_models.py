"""Writes what `lit-vapo plan` says of the models of configs/model/ into their headers.

    python benchmarks/plan_models.py

A plan needs a model's `config.json` alone. Here it is made from the dimensions that the models' makers have published,
so that nothing is downloaded.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lit_vapo.commands.plan_settings import read_settings
from lit_vapo.models.weights import quiet
from lit_vapo.plan.draft import Plan
from lit_vapo.plan.formulas import fits
from lit_vapo.plan.gpus import GB, find_gpu

CONFIGS = Path(__file__).parents[1] / "configs"


def _sizes(kind: str, hidden: int, inner: int, layers: int, heads: int, kv: int, head: int, vocabulary: int) -> Any:
    return AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head,
        vocab_size=vocabulary,
        dtype="bfloat16",
    )


# By file of configs/model/: public dimensions, whether embeddings and head are one, the GPU of the header and how many.
MODELS: dict[str, tuple[tuple[Any, ...], bool, str, int]] = {
    "qwen3_0_6b": (("qwen3", 1024, 3072, 28, 16, 8, 128, 151936), True, "L4", 1),
    "qwen3_4b": (("qwen3", 2560, 9728, 36, 32, 8, 128, 151936), True, "L4", 1),
    "qwen3_8b": (("qwen3", 4096, 12288, 36, 32, 8, 128, 151936), False, "A100-40", 1),
    "llama3_1b": (("llama", 2048, 8192, 16, 32, 8, 64, 128256), True, "L4", 1),
    "gemma3_1b": (("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144), True, "L4", 1),
    "mistral_7b_8bit": (("mistral", 4096, 14336, 32, 32, 8, 128, 32768), False, "L4", 1),
    "qwen3_32b": (("qwen3", 5120, 25600, 64, 64, 8, 128, 151936), False, "H100", 2),
    "llama3_70b": (("llama", 8192, 28672, 80, 64, 8, 128, 128256), False, "H100", 4),
}


def make_config(name: str, folder: Path) -> Path:
    """The folder of a model of configs/model/, with nothing but its `config.json`."""
    sizes, tied, _, _ = MODELS[name]
    config = _sizes(*sizes)
    config.tie_word_embeddings = tied
    config.save_pretrained(folder / name)
    return folder / name


def options(stage: str, name: str, model: Path) -> list[str]:
    """The command line of a header, with the folder in place of the hub's name."""
    return [
        f"--config={CONFIGS / stage / 'large.yaml'}",
        f"--config={CONFIGS / 'model' / f'{name}.yaml'}",
        f"--data={CONFIGS / 'data' / 'ultrafeedback.yaml'}",
        "--trainer.precision=bf16-mixed",
        f"--model.base.path={model}",
        f"--data.tokenizer={model}",
    ]


def plans(name: str, folder: Path) -> dict[str, Plan]:
    """The plan of each stage of a model."""
    devices = MODELS[name][3]
    strategy = "fsdp2" if devices > 1 else None
    model = make_config(name, folder)
    made = {"ppo": read_settings("ppo", options("ppo", name, model), devices, strategy).plan()}
    for stage, bits in (("reward", []), ("reward in 4 bits", ["--model.base.quantization=4bit"])):
        made[stage] = read_settings("reward", [*options("reward", name, model), *bits]).plan()
        if fits(made[stage].peak, find_gpu(MODELS[name][2]).memory):
            break
    return made


def header(name: str, made: dict[str, Plan]) -> str:
    """The header's words on hardware."""
    _, _, gpu, devices = MODELS[name]
    count = f"{devices} {gpu}" if devices > 1 else f"one {gpu}"
    taken = sum(made["ppo"].seconds(find_gpu(gpu)).values())
    heads = f"{made['reward'].peak / GB:.0f} GB"
    if "reward in 4 bits" in made:
        heads += f", in 4 bits {made['reward in 4 bits'].peak / GB:.0f} GB"
    return (
        f"# Hardware:      {count}. By `lit-vapo plan`, not measured: PPO {made['ppo'].peak / GB:.0f} GB"
        f"{' each' if devices > 1 else ''}, an\n#                iteration of 64 prompts a GPU {taken:.0f} s; reward "
        f"heads {heads}.\n"
    )


def main() -> None:
    """Plan each model, and write its header."""
    quiet()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            words = header(name, plans(name, Path(folder)))
            file = CONFIGS / "model" / f"{name}.yaml"
            text = re.sub(r"# Hardware:(.|\n)*?(?=# Prerequisite)", lambda _, words=words: words, file.read_text())
            file.write_text(text)
            print(name, words, flush=True)


if __name__ == "__main__":
    main()
