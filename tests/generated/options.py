"""Options of the commands: what is given reaches the run, or is refused."""

import contextlib
import functools
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from hypothesis import strategies as st

from lit_vapo.cli import main
from tests import helpers
from tests.generated import world
from tests.generated.harm import SHARE
from tests.generated.outcome import Kind, WrongError

NUMBERS = f"-1 0 1 2 3 7 0.5 0.1 1.5 -0.1 1e-3 1e30 nan inf -inf {10**20}"
WORDS = "null true false x é [] [1] [a] {} {a:1} 1,2 '1' /nowhere ../x no"
VALUES = st.sampled_from(["", "{a: 1}", *NUMBERS.split(), *WORDS.split()])
# Left out: processes, and what makes a run long or writes elsewhere.
TRAINER = ("max_steps", "gradient_clip_val", "accumulate_grad_batches", "limit_train_batches", "limit_val_batches")
TRAINER += ("log_every_n_steps", "check_val_every_n_epoch", "val_check_interval", "precision", "overfit_batches")
OTHERS = ("num_workers", "dirpath", "seed_everything")


class Given(NamedTuple):
    """A stage, and options given to it: which (as a share of those there are), and the text of each."""

    stage: str
    options: list[tuple[float, str]]


CASES = st.builds(
    Given,
    st.sampled_from(("sft", "reward", "reward", "ppo")),
    st.lists(st.tuples(SHARE, VALUES), min_size=1, max_size=2),
)


@functools.cache
def base(stage: str) -> tuple[str, ...]:
    """Options of a tiny run."""
    given = {
        "config": helpers.CONFIGS / stage / "tiny.yaml",
        "model.base.path": world.model(),
        "data.tokenizer": world.model(),
        # Of any number of steps, it ends.
        "trainer.max_epochs": 1,
        "data.preferences": helpers.tiny_preferences(world.root() / "preferences.jsonl"),
        "data.prompts": helpers.tiny_prompts(world.root() / "prompts.jsonl"),
    }
    if stage == "ppo":
        given["model.reward"] = world.exported("reward")
    return tuple(f"--{key}={value}" for key, value in given.items())


@functools.cache
def keys(stage: str) -> list[str]:
    """Every option of a stage that may be tried."""
    printed, words = io.StringIO(), [stage, "fit", *base(stage), "--print_config"]
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(words)
    config = yaml.safe_load(printed.getvalue())
    config["trainer"] = {name: config["trainer"][name] for name in TRAINER}
    return [key for key in leaves(config) if key.rpartition(".")[2] not in OTHERS]


def leaves(config: dict[str, Any], before: str = "") -> list[str]:
    """Keys of settings that hold no others."""
    found = []
    for name, value in config.items():
        found += leaves(value, f"{before}{name}.") if isinstance(value, dict) and value else [f"{before}{name}"]
    return found


def check_options(case: Given, folder: Path) -> None:
    """Run the stage, and look what its configuration and its checkpoint say."""
    names = keys(case.stage)
    given = {names[int(share * len(names))]: text for share, text in case.options}
    words = [f"--{key}={text}" for key, text in given.items()]
    main([case.stage, "fit", *base(case.stage), f"--trainer.default_root_dir={folder / 'run'}", *words])
    config = yaml.safe_load((folder / "run" / "logs" / "version_0" / "config.yaml").read_text())
    saved = torch.load(helpers.last(folder / "run"), weights_only=True)["hyper_parameters"]
    for key, text in given.items():
        for where, holder in (("config.yaml", config), ("checkpoint", {"model": saved})):
            if where == "config.yaml" or key.startswith("model."):
                found = look_up(holder, key.split("."))
                if not says(found, text):
                    raise WrongError(f"--{key}={text}: the {where} says {found!r}")


def look_up(config: Any, path: list[str]) -> Any:
    """The value at a key; `...` if there is none."""
    for name in path:
        if not isinstance(config, dict) or name not in config:
            return ...
        config = config[name]
    return config


def says(value: Any, text: str) -> bool:
    """Whether a value is what a text means, as a text or as YAML."""
    meant = yaml.safe_load(text)
    with contextlib.suppress(ValueError, TypeError):
        if float(value) == float(text) or (value != value and text == "nan"):
            return True
    return value in (text, meant, [text], str(Path(text).absolute())) or str(value) in (text, str(meant))


KINDS = [Kind("options", CASES, check_options, 2)]
