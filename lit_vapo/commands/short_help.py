"""The options of a stage that people set, in a moment: read off the source, so that nothing heavy is imported.

What an option does and its default stand in the docstring and the signature that the parser reads, too. Only what comes
from Lightning is said here; a test compares all of it with the parser.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import textwrap
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]
REQUIRED = "required"
# Where descriptions begin.
COLUMN = 34
# Where options are explained that begin so.
PLACES = {
    "model.base.": ("models/pretrained.py", "Pretrained"),
    "model.sampling.": ("models/generation.py", "Sampling"),
    "data.": ("data/datamodule.py", "TextDataModule"),
}
MODULES = {
    "sft": ("stages/sft/module.py", "SFTModule"),
    "reward": ("stages/reward/module.py", "RewardModule"),
    "ppo": ("stages/ppo/module.py", "PPOModule"),
}
# Where the classes are that an option takes by name.
CLASSES = {
    "model.objective": "objectives/*.py",
    "model.advantage": "advantages/*.py",
    "model.head": "rewards/members/*.py",
    "model.generator": "models/*_generator.py",
}
COMMON = ("model.base.path", "model.base.quantization")
OPTIONS = {
    "sft": (*COMMON, "model.lora", "model.learning_rate", "data.preferences", "data.max_length", "data.batch_size"),
    "reward": (
        *(*COMMON, "model.head", "model.layer", "model.pooling", "model.freeze_backbone", "model.learning_rate"),
        *("model.reference", "data.preferences", "data.preferences_validation", "data.preferences_test"),
        *("data.validation_fraction", "data.max_length", "data.batch_size"),
    ),
    "ppo": (
        *(*COMMON, "model.reward", "model.objective", "model.advantage", "model.lora", "model.policy"),
        *("model.sampling.max_new_tokens", "model.sampling.num_responses", "model.generator", "model.learning_rate"),
        *("model.ema_decay", "model.kl_coef", "model.kl_budget", "model.missing_eos_penalty", "model.gold"),
        *("data.prompts", "data.max_prompt_length", "data.batch_size"),
    ),
}
TRAINER = {
    "trainer.default_root_dir": "Folder of the run.",
    "trainer.devices": "How many GPUs, or their numbers.",
    "trainer.precision": "`bf16-mixed` on GPUs that have it; `null` is float32.",
}
FIT = {
    "trainer.max_epochs": "Passes over the data; `null` is 1000, or as many as `trainer.max_steps` takes.",
    "resume": "Go on from the newest checkpoint of the run's folder, if there is one.",
    "overwrite": "Replace the run that the folder holds, if there is one.",
}
JUDGED = {"ckpt_path": "The checkpoint: a file, or `last` or `best` of the run's folder."}
DEFAULTS = {"trainer.devices": "auto", "resume": "false", "overwrite": "false"}


class Option(NamedTuple):
    """An option.

    Attributes:
        name: Without dashes.
        about: What it does, in a sentence.
        default: As a file of options has it; `required` where there is none.
        choices: Its values, where they are few.
    """

    name: str
    about: str
    default: str
    choices: tuple[str, ...] = ()


def options(stage: str, part: str) -> list[Option]:
    """The options of a stage that people set.

    Args:
        stage: `sft`, `reward` or `ppo`.
        part: `fit`, `validate`, `test` or `predict`.
    """
    found = []
    for name in OPTIONS[stage]:
        prefix = next((prefix for prefix in PLACES if name.startswith(prefix)), "model.")
        about, default, choices = explained(*PLACES.get(prefix, MODULES[stage]))[name.removeprefix(prefix)]
        if name in CLASSES:
            choices = classes(CLASSES[name])
        found.append(Option(name, about, default, choices))
    others = TRAINER | (FIT if part == "fit" else JUDGED)
    defaults = DEFAULTS | {"trainer.default_root_dir": f"runs/{stage}"}
    return found + [Option(name, about, defaults.get(name, "null")) for name, about in others.items()]


@cache
def explained(file: str, name: str) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """The parameters of a class: what each does in a sentence, its default, and its values if its type lists them."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    (node,) = (x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == name)
    about = _arguments(ast.get_docstring(node) or "")
    # A dataclass has fields; of others the constructor says it.
    found = [(ast.unparse(x.target), x.annotation, x.value) for x in node.body if isinstance(x, ast.AnnAssign)]
    for made in (x.args for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"):
        parameters = made.args[1:]
        defaults = [*[None] * (len(parameters) - len(made.defaults)), *made.defaults]
        found = [(x.arg, x.annotation or ast.Constant(None), y) for x, y in zip(parameters, defaults, strict=True)]
    return {x: (about.get(x, ""), REQUIRED if y is None else _yaml(y), _listed(kind)) for x, kind, y in found}


def _arguments(docstring: str) -> dict[str, str]:
    """The first sentence about each argument."""
    listed = re.search(r"^Args:\n((?: .*\n?|\n)+)", docstring, re.MULTILINE)
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", listed[1] if listed else "", re.MULTILINE)
    return {name: re.split(r"(?<=\.) ", " ".join(text.split()), maxsplit=1)[0] for name, text in found}


def _yaml(default: ast.expr) -> str:
    value = ast.literal_eval(default)
    return value if isinstance(value, str) else json.dumps(value)


def _listed(kind: ast.expr) -> tuple[str, ...]:
    """The values of a type that is a `Literal`, or nothing besides `None`."""
    parts = [kind]
    while isinstance(parts[0], ast.BinOp):
        parts[:1] = [parts[0].left, parts[0].right]
    parts = [x for x in parts if ast.unparse(x) != "None"]
    if not all(isinstance(x, ast.Subscript) and ast.unparse(x.value) == "Literal" for x in parts):
        return ()
    return tuple(str(x.value) for part in parts for x in ast.walk(part) if isinstance(x, ast.Constant))


def classes(pattern: str) -> tuple[str, ...]:
    """The classes that files define besides the bases, as far as their names are public."""
    paths = [path for path in sorted(PACKAGE.glob(pattern)) if path.name != "base.py"]
    return tuple(name for path in paths for name in re.findall(r"^class ([A-Z]\w*)\(", path.read_text("utf-8"), re.M))


def short_help(stage: str, part: str) -> str:
    """What `lit-vapo STAGE PART --help` prints."""
    command = f"lit-vapo {stage} {part}"
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [f"usage: {command} --config FILE [--OPTION=VALUE ...]", "", "options that people set:"]
    given = Option("config", f"Options from a file, such as those in configs/{stage}; of several the last counts.", "")
    for option in (given, *options(stage, part)):
        said = option.about.replace("`", "")
        said += f" One of {', '.join(option.choices)}." * bool(option.choices)
        said += f" [{option.default}]" * bool(option.default)
        first, *rest = textwrap.wrap(said, width - COLUMN) or [""]
        name = f"  --{option.name}"
        lines += [f"{name:{COLUMN}}{first}"] if len(name) < COLUMN - 1 else [name, " " * COLUMN + first]
        lines += [" " * COLUMN + line for line in rest]
    more = {f"--{name}.help=CLASS": "options of a class" for name in OPTIONS[stage] if name in CLASSES}
    more |= {"--print_config": "all values, as a file", "--help_all": "all options, in some seconds"}
    lines += ["", "more:", *(f"  {command + ' ' + word:{COLUMN + 16}}{what}" for word, what in more.items())]
    return "\n".join(lines)
