"""The floors of docs/architecture.md: every import of the package is read, and none may go up or astray."""

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lit_vapo"
ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 300

# The first part of a module's name below the package decides its floor. The package's own __init__ ("") is
# imported before any of them, so it stands on the ground floor too.
FLOORS = {
    "": 0,
    "console": 0,
    "folders": 0,
    "stops": 0,
    "functional": 0,
    "integrity": 0,
    "types": 0,
    "models": 1,
    "uncertainty": 1,
    "objectives": 1,
    "advantages": 1,
    "data": 1,
    "rollout": 1.5,
    "metrics": 1.5,
    "evaluation": 1.5,
    "figures": 1.5,
    "modules": 2,
    "callbacks": 2,
    "study": 2,
    "cli": 3,
    "__main__": 3,
}
# Plug-ins of floor 1 do not know each other: (importer, imported) pairs that may.
SIBLING_EXCEPTIONS = {("lit_vapo.rewards.reward_model", "lit_vapo.rewards.members.base")}

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
LIGHTNING_HOMES = {"modules", "callbacks", "study", "cli"}
LIGHTNING_FILES = {"lit_vapo.data.datamodule"}
HUGGING_FACE = {"transformers", "datasets", "peft", "bitsandbytes"}
HUGGING_FACE_HOMES = {"models", "data"}
TYPE_GUARDS = {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
GROUND_FLOOR_LIBRARIES = {"torch"} | set(sys.stdlib_module_names)


def component(module: str) -> str:
    """`lit_vapo.rewards.reward_model` -> `models`; the package itself -> the empty string."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported_modules(name: str, source: str, is_package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each module that `source` imports, inside functions too.

    `from lit_vapo import models` names a module, `from lit_vapo.types import RewardEstimate` a thing in one:
    `known`, the package's modules, tells them apart. A library imported for type checkers alone is not loaded
    and does not count; a module of the package does, since the importer knows of it all the same.
    """
    tree = ast.parse(source)
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) in TYPE_GUARDS]
    unloaded = {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        for imported in names_of(node, name, is_package, known):
            if node not in unloaded or imported.split(".")[0] == PACKAGE:
                yield node.lineno, imported


def names_of(node: ast.AST, name: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """Absolute names of the modules that one statement imports (none if it is no import)."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = name.split(".") if is_package else name.split(".")[:-1]
            parents = parents[: len(parents) - (node.level - 1)]
            base = ".".join([*parents, base] if base else parents)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in known else base


def library_problem(importer: str, library: str) -> str | None:
    """Why `importer` may not import this third-party or standard library, or None."""
    home = component(importer)
    if library in LIGHTNING and home not in LIGHTNING_HOMES and importer not in LIGHTNING_FILES:
        return f"{library} belongs in {', '.join(sorted(LIGHTNING_HOMES | LIGHTNING_FILES))}"
    if library in HUGGING_FACE and home not in HUGGING_FACE_HOMES:
        return f"{library} belongs in {', '.join(sorted(HUGGING_FACE_HOMES))}"
    if FLOORS[home] == 0 and library not in GROUND_FLOOR_LIBRARIES:
        return f"floor 0 is pure torch, not {library}"
    return None


def floor_problem(importer: str, imported: str) -> str | None:
    """Why `importer` may not import this module of the package, or None."""
    source, target = component(importer), component(imported)
    if target not in FLOORS:
        return f"{imported} has no floor: add {target!r} to FLOORS and to docs/architecture.md"
    if source == target or (importer, imported) in SIBLING_EXCEPTIONS:
        return None
    if FLOORS[target] > FLOORS[source]:
        return f"{imported} is on floor {FLOORS[target]}, above floor {FLOORS[source]}"
    if FLOORS[source] == FLOORS[target] == 1:
        return f"{imported} is a sibling on floor 1"
    return None


def cycle(edges: Mapping[str, set[str]]) -> str | None:
    """A circle among components of one floor (imports down cannot make one), or None."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return None


def violations(sources: Mapping[str, str]) -> list[str]:
    """What is wrong with the imports of a package.

    Args:
        sources: Text of each module, by path relative to the repository (`lit_vapo/rewards/ensemble.py`).

    Returns:
        One line `path:line: reason` for each import that breaks a rule.
    """
    names = {path: module_name(path) for path in sources}
    known = set(names.values())
    problems = []
    edges: dict[str, set[str]] = {}
    for path, name in names.items():
        if component(name) not in FLOORS:
            problems.append(f"{path}:1: {name} has no floor: add {component(name)!r} to FLOORS")
            continue
        is_package = path.endswith("__init__.py")
        for line, imported in imported_modules(name, sources[path], is_package, known):
            top = imported.split(".")[0]
            inside = top == PACKAGE
            problem = floor_problem(name, imported) if inside else library_problem(name, top)
            if problem:
                problems.append(f"{path}:{line}: {problem}")
            elif inside and component(name) != component(imported):
                edges.setdefault(component(name), set()).add(component(imported))
    circle = cycle(edges)
    if circle:
        problems.append(f"{PACKAGE}: circle of imports: {circle}")
    return problems


def module_name(path: str) -> str:
    """`lit_vapo/data/__init__.py` -> `lit_vapo.data`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def too_long(sources: Mapping[str, str], limit: int) -> list[str]:
    """Files of more than `limit` lines."""
    counts = {path: len(text.splitlines()) for path, text in sources.items()}
    return [f"{path}: {count} lines" for path, count in counts.items() if count > limit]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert paths, f"no Python files under {ROOT / PACKAGE}"
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_imports_go_down_only(sources: dict[str, str]) -> None:
    assert violations(sources) == []


def test_files_stay_short(sources: dict[str, str]) -> None:
    assert too_long(sources, MAX_LINES) == []


@pytest.mark.parametrize(
    ("path", "code", "reason"),
    [
        ("lit_vapo/functional/kl.py", "from lit_vapo.rewards.reward_model import RewardModel", "above floor 0"),
        ("lit_vapo/functional/kl.py", "from ..models import reward", "above floor 0"),
        ("lit_vapo/functional/__init__.py", "from ..models.reward import RewardModel", "above floor 0"),
        ("lit_vapo/functional/kl.py", "from lit_vapo import models", "above floor 0"),
        (
            "lit_vapo/functional/kl.py",
            "def f():\n    import lit_vapo.cli",
            "kl.py:2: lit_vapo.cli is on floor 3",
        ),
        ("lit_vapo/__init__.py", "from lit_vapo.cli import main", "above floor 0"),
        ("lit_vapo/types.py", "import numpy", "floor 0 is pure torch, not numpy"),
        (
            "lit_vapo/objectives/new.py",
            "from lit_vapo.rewards.members.base import RewardHead",
            "sibling on floor 1",
        ),
        (
            "lit_vapo/rewards/ensemble.py",
            "from lit_vapo.rewards.members.heads import X",
            "sibling on floor 1",
        ),
        (
            "lit_vapo/rewards/ensemble.py",
            "from lit_vapo.rewards.members import base, head_ensemble",
            "sibling on floor 1",
        ),
        ("lit_vapo/objectives/new.py", "from lit_vapo.rollout import Rollout", "above floor 1"),
        ("lit_vapo/rollout/maker.py", "from lit_vapo.modules import ppo", "above floor 1.5"),
        ("lit_vapo/stages/ppo/module.py", "from lit_vapo.cli import main", "above floor 2"),
        ("lit_vapo/rollout/maker.py", "import lightning.pytorch as pl", "lightning belongs in"),
        ("lit_vapo/data/tokenise.py", "from lightning import seed_everything", "lightning belongs in"),
        (
            "lit_vapo/models/policy.py",
            "from pytorch_lightning import Trainer",
            "pytorch_lightning belongs in",
        ),
        ("lit_vapo/stages/ppo/module.py", "from transformers import AutoModel", "transformers belongs in"),
        ("lit_vapo/uncertainty/new.py", "import peft.tuners", "peft belongs in"),
        ("lit_vapo/rollout/maker.py", "import datasets", "datasets belongs in"),
        ("lit_vapo/cli.py", "import bitsandbytes", "bitsandbytes belongs in"),
        (
            "lit_vapo/rollout/maker.py",
            "if TYPE_CHECKING:\n    import os\nelse:\n    import peft",
            "peft belongs in",
        ),
        (
            "lit_vapo/rollout/maker.py",
            "if TYPE_CHECKING:\n    from lit_vapo.stages.ppo.module import X",
            "above floor 1.5",
        ),
        ("lit_vapo/helpers.py", "", "has no floor"),
        ("lit_vapo/cli.py", "from lit_vapo.helpers import x", "has no floor"),
    ],
)
def test_checker_refuses(path: str, code: str, reason: str) -> None:
    others = ("models", "models/reward", "uncertainty", "uncertainty/base", "uncertainty/head_ensemble")
    package = {f"lit_vapo/{other}.py": "" for other in (*others, "modules/ppo")}
    problems = violations({**package, path: code})
    assert len(problems) == 1
    assert reason in problems[0]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("lit_vapo/functional/kl.py", "import math\nimport torch\nfrom lit_vapo.types import RewardEstimate"),
        ("lit_vapo/functional/kl.py", "from .masked import masked_sum"),
        (
            "lit_vapo/rewards/ensemble.py",
            "from lit_vapo.rewards.members.base import RewardHead\nimport transformers",
        ),
        ("lit_vapo/rewards/ensemble.py", "from lit_vapo.rewards.members import base"),
        (
            "lit_vapo/data/datamodule.py",
            "import lightning, datasets\nfrom lit_vapo.data.sources import load_rows",
        ),
        ("lit_vapo/rollout/maker.py", "import torchmetrics\nfrom lit_vapo.objectives.base import Objective"),
        ("lit_vapo/rollout/maker.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("lit_vapo/stages/ppo/module.py", "import lightning\nfrom lit_vapo.rollout import Rollout"),
        ("lit_vapo/commands/export.py", "from lit_vapo.stages.ppo.module import PPOModule"),
        (
            "lit_vapo/cli.py",
            "from lightning.pytorch.cli import LightningCLI\nfrom lit_vapo import __version__",
        ),
    ],
)
def test_checker_accepts(path: str, code: str) -> None:
    assert violations({"lit_vapo/rewards/members/base.py": "", path: code}) == []


def test_checker_refuses_a_circle_on_one_floor() -> None:
    package = {
        "lit_vapo/stages/ppo/module.py": "from lit_vapo.callbacks.table import Table",
        "lit_vapo/callbacks/table.py": "from lit_vapo.stages.ppo.module import PPOModule",
    }
    (problem,) = violations(package)
    assert "circle of imports" in problem


def test_line_count_refuses() -> None:
    assert too_long({"a.py": "x\n" * 301, "b.py": "x\n" * 300}, limit=300) == ["a.py: 301 lines"]
