"""`lit-vapo convert trl`: a configuration of TRL as one of ours, and what of it has no counterpart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_vapo.commands.trl_rules import ELSEWHERE, GRPO, PPO, READ_WITH_OTHERS, REWARD, Rule, Written
from lit_vapo.folders import write_whole

WIDTH = 118


@dataclass(frozen=True)
class Kind:
    """A trainer of theirs.

    Args:
        config: What its settings are called there.
        stage: Ours.
        rules: By their names.
        marks: Names that only this one has.
        adds: What ours needs besides.
    """

    config: str
    stage: str
    rules: Mapping[str, Rule]
    marks: frozenset[str]
    adds: Written = field(default_factory=dict)


KINDS = {
    "ppo": Kind(
        "PPOConfig",
        "ppo",
        PPO,
        frozenset({"num_ppo_epochs", "reward_model_path", "sft_model_path", "cliprange", "response_length", "vf_coef"}),
        {"trainer.max_epochs": 1},
    ),
    "grpo": Kind(
        "GRPOConfig",
        "ppo",
        GRPO,
        frozenset({"num_generations", "max_completion_length", "num_iterations", "beta", "epsilon", "scale_rewards"}),
        {"trainer.max_epochs": 1, "model.update.minibatches": 1, "model.objective.class_path": "MeanReward"},
    ),
    "reward": Kind(
        "RewardConfig", "reward", REWARD, frozenset({"center_rewards_coefficient"}), {"trainer.max_epochs": 3}
    ),
}


class Converted(NamedTuple):
    """A configuration of ours.

    Attributes:
        settings: By stage, nested as in a file.
        notes: What is other than there, by their name.
        elsewhere: What a run does anyway or takes from another file, by their name.
        lost: Their names of what has no counterpart.
    """

    settings: dict[str, Any]
    notes: dict[str, str]
    elsewhere: dict[str, str]
    lost: list[str]


def trl(config: str, output: str | None = None, kind: str | None = None) -> None:
    """Write a TRL configuration as one of ours, and say what has no counterpart.

    Args:
        config: A YAML file of options of TRL's `PPOConfig`, `GRPOConfig` or `RewardConfig`, with those of its model and
            data set, as TRL's own scripts and its command line take it.
        output: A new file; `null` prints.
        kind: `ppo`, `grpo` or `reward`; `null` tells it by the options.

    Raises:
        ValueError: The file cannot be read, or nobody can tell whose options it has.
        FileExistsError: There is a file already.
    """
    given = read_options(Path(config))
    chosen = KINDS[found_kind(given, kind, config)]
    text = written(convert(given, chosen), chosen, config, output or "converted.yaml")
    if output is None:
        print(text, end="")
        return
    if Path(output).exists():
        raise FileExistsError(f"--output: expected a new file, got {output!r}")
    write_whole(Path(output), text)
    print(f"wrote {output}; the comments at its head say what is other than there")


def read_options(path: Path) -> dict[str, Any]:
    """The options of a file.

    Raises:
        ValueError: It cannot be read, or has something else in it.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected a YAML file of options, got {str(error).splitlines()[0]}") from None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{path}: expected options by name (key: value), got {type(given).__name__}")
    return given


def found_kind(given: Mapping[str, Any], kind: str | None, config: str) -> str:
    """Whose options these are.

    Raises:
        ValueError: Nobody can tell, or the kind is none.
    """
    if kind is not None:
        if kind not in KINDS:
            raise ValueError(f"--kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        return kind
    marked = [name for name, about in KINDS.items() if about.marks & given.keys()]
    if len(marked) != 1:
        names = [about.config for about in KINDS.values()]
        got = "none of their own" if not marked else "those of " + " and ".join(KINDS[name].config for name in marked)
        raise ValueError(f"{config}: expected options of one of {', '.join(names)}, got {got}; --kind says which")
    return marked[0]


def convert(given: Mapping[str, Any], kind: Kind) -> Converted:
    """Our settings for theirs.

    Args:
        given: Their options.
        kind: Whose.
    """
    defaults = {name: rule.default for name, rule in kind.rules.items() if rule.default is not None}
    settings = defaults | dict(given)
    flat = dict(kind.adds)
    notes: dict[str, str] = {}
    for name, value in settings.items():
        rule: Rule | None = kind.rules.get(name)
        if rule is None or (value is None and rule.write is None):
            continue
        flat |= rule(value, settings)
        if rule.note and name in given:
            notes[name] = rule.note
    elsewhere = {name: ELSEWHERE[name] for name in given if name in ELSEWHERE and name not in kind.rules}
    known = kind.rules.keys() | ELSEWHERE.keys() | READ_WITH_OTHERS
    return Converted(nested(flat), notes, elsewhere, sorted(given.keys() - known))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted keys, as a file has them."""
    root: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        at = root
        for name in path:
            at = at.setdefault(name, {})
        at[last] = value
    return root


def written(found: Converted, kind: Kind, config: str, output: str) -> str:
    """The file: comments, then settings."""
    model, data = found.settings.get("model", {}), found.settings.get("data", {})
    texts = "preferences" if kind.stage == "reward" else "prompts"
    needs = {
        " --model.base.path MODEL --data.tokenizer MODEL": "path" in model.get("base", {}),
        f" --data.{texts} FILE": texts in data,
        " --model.reward FOLDER": kind.stage == "reward" or "reward" in model,
    }
    needed = [words for words, there in needs.items() if not there]
    head = [
        f"From {Path(config).name}, options of TRL's {kind.config}. What it leaves open has TRL's default.",
        f"Command:   lit-vapo {kind.stage} fit --config {output}{''.join(needed)}",
    ]
    parts = {
        "Other than there": [f"{name}: {note}" for name, note in found.notes.items()],
        "Elsewhere": [f"{name}: {place}" for name, place in found.elsewhere.items()],
        "No counterpart": found.lost,
    }
    for title, entries in parts.items():
        if entries:
            head += [f"{title}:", *(f"  {entry}" for entry in entries)]
    body = yaml.safe_dump(found.settings, sort_keys=False, allow_unicode=True, width=WIDTH)
    return "".join(f"# {line}\n" for line in head) + body


def main(words: Sequence[str]) -> None:
    """Parse a command line without `lit-vapo convert trl`, and run."""
    from lit_vapo.commands.options import Parser

    parser = Parser(prog="lit-vapo convert trl", description=(trl.__doc__ or "").partition("\n\n")[0])
    parser.add_argument("config", type=str, help="A YAML file of options of TRL.")
    parser.add_function_arguments(trl, skip={"config"}, as_group=False)
    trl(**parser.parse_args(list(words)).as_dict())
