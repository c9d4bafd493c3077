"""The command line: `lit-vapo STAGE fit|validate|test|predict …`, one LightningCLI for each stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from lit_vapo.console import lasting, reported

USAGE = """usage: lit-vapo STAGE COMMAND [options]

stages:
  sft       make a base policy by supervised fine-tuning
  reward    train an ensemble of reward models
  ppo       align the policy
  export    turn a checkpoint into a folder that other programs load

commands of a stage: fit, validate, test (ppo: predict too); their options: lit-vapo STAGE fit --help

commands for a finished ensemble:
  reward join          make one ensemble of members trained in runs of their own
  reward calibrate     centre and scale the members anew on responses of a reference policy
  reward disagreement  draw the scores of all members, and the distribution of their σ
  reward evaluate      test any rewards on preference pairs
  reward serve         score for others over HTTP

commands for data:
  data show            show what training makes of a file, token by token, and count what is wrong with it

commands for repeated runs:
  study run            run what is missing of a study, and report
  study report         tables, pictures and verdicts of a study
"""
STAGES = ("sft", "reward", "ppo")
TOOLS = ("join", "calibrate", "disagreement", "evaluate", "serve")
STUDY = ("run", "report")


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: Command line without the program's name. If `None`, it is that of the process, which then ends as a
            command does: an error of the user is one message and exit code 2. Who calls this from Python gets the
            exception.

    Raises:
        ValueError: There is no such command, or it refuses what it was given.
    """
    if args is None:
        sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
        with reported():
            _run(sys.argv[1:])
    else:
        _run(list(args))


def _run(words: list[str]) -> None:
    # Your own estimators, objectives and judges are found from where you stand, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
    elif words[0] == "export":
        _export(words[1:])
    elif words[0] == "reward" and words[1:2] and words[1] in TOOLS:
        _tool(words[1], words[2:])
    elif words[:2] == ["data", "show"]:
        _data_show(words[2:])
    elif words[0] == "study" and words[1:2] and words[1] in STUDY:
        _study(words[1:])
    elif words[0] in STAGES:
        _stage(words[0], words[1:])
    else:
        given = " ".join(words[:2]) if words[0] in ("study", "data") else words[0]
        raise ValueError(
            f"expected a stage ({', '.join(STAGES)}), export, data show, study run or study report, got {given!r}\n"
            "All commands: lit-vapo --help"
        )


def _stage(stage: str, words: list[str]) -> None:
    # Imported here so that `lit-vapo --help` answers at once.
    from lit_vapo.commands.run import StageCLI
    from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule, SFTDataModule
    from lit_vapo.stages.ppo.module import PPOModule
    from lit_vapo.stages.reward.module import RewardModule
    from lit_vapo.stages.sft.module import SFTModule

    classes: dict[str, tuple[Any, Any]] = {
        "sft": (SFTModule, SFTDataModule),
        "reward": (RewardModule, PreferenceDataModule),
        "ppo": (PPOModule, PromptDataModule),
    }
    StageCLI(*classes[stage], stage=stage, args=words)


def _tool(name: str, words: list[str]) -> None:
    import inspect

    from lit_vapo.commands import ensembles, evaluate, serve
    from lit_vapo.commands.options import Parser, check_models
    from lit_vapo.data.datamodule import PreferenceDataModule
    from lit_vapo.models.pretrained import quiet

    quiet()
    function = getattr({"evaluate": evaluate, "serve": serve}.get(name, ensembles), name)
    summary = (inspect.getdoc(function) or "").partition("\n\n")[0]
    parser = Parser(prog=f"lit-vapo reward {name}", description=summary)
    parser.add_argument("--config", action="config", help="Options from a file.")
    takes_data = "data" in inspect.signature(function).parameters
    if takes_data:
        # The options of the stages' data, and so the same files.
        parser.add_class_arguments(PreferenceDataModule, "data")
    parser.add_function_arguments(function, skip={"data"} if takes_data else None, as_group=False)
    parsed = parser.parse_args(words)
    check_models(parsed)
    given = parser.instantiate_classes(parsed)
    function(**{key: value for key, value in given.as_dict().items() if key != "config"})


def _export(words: list[str]) -> None:
    from lit_vapo.commands.export import export
    from lit_vapo.commands.options import Parser

    parser = Parser(prog="lit-vapo export", description=(export.__doc__ or "").partition("\n\n")[0])
    parser.add_function_arguments(export, as_group=False)
    export(**parser.parse_args(words).as_dict())


def _data_show(words: list[str]) -> None:
    from lit_vapo.commands.data_show import main as show

    show(words)


def _study(words: list[str]) -> None:
    try:
        from lit_vapo.study.command import main as study
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("joblib", "scipy", "statsmodels"):
            raise
        raise ValueError(f"lit-vapo study needs {error.name}: pip install 'lit-vapo[study]'") from error

    study(words)
