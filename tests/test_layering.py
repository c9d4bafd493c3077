"""The floors of docs/architecture.md: import-linter checks them (pyproject.toml), and here is that it does.

What it cannot say is below: what the ground floor may import at all, which imports are for type checkers alone, and how
long a file may be.
"""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lit_vapo"
GROUND = ("functional", "types", "folders", "integrity", "console", "stops", "plugins", "ranges", "http_client")
GROUND_LIBRARIES = {"torch", *sys.stdlib_module_names}
MAX_LINES = 300


WRONG = [
    ("functional/kl.py", "from lit_vapo.rewards.source import Responses", "lit_vapo.functional.kl -> lit_vapo.rewards"),
    ("functional/masked.py", "def f():\n    import lit_vapo.cli", "lit_vapo.functional.masked -> lit_vapo.cli"),
    ("rollout/maker.py", "from ..stages import sft", "lit_vapo.rollout.maker -> lit_vapo.stages.sft"),
    ("models/new.py", "from lit_vapo.rewards import source", "lit_vapo.models.new -> lit_vapo.rewards.source"),
    (
        "rollout/ending.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lit_vapo.stages.ppo.module import PPOModule",
        "lit_vapo.rollout.ending -> lit_vapo.stages.ppo.module",
    ),
    ("objectives/new.py", "from lit_vapo.advantages.gae import Gae", "lit_vapo.objectives.new -> lit_vapo.advantages"),
    ("data/new.py", "from lit_vapo.models.policy import Policy", "lit_vapo.data.new -> lit_vapo.models.policy"),
    ("stages/sft/new.py", "import lit_vapo.callbacks.samples", "lit_vapo.stages.sft.new -> lit_vapo.callbacks"),
    ("__init__.py", "from lit_vapo.types import Prompt", "lit_vapo -> lit_vapo.types"),
    ("helpers.py", "", "- lit_vapo.helpers"),
    ("objectives/base.py", "from lit_vapo.objectives.worst_case import WorstCase", "allowed in lit_vapo.objectives."),
    ("rollout/rollout.py", "from lightning.pytorch import Trainer", "lit_vapo.rollout.rollout -> lightning"),
    ("data/tokenise.py", "import lightning", "lit_vapo.data.tokenise -> lightning"),
    ("stages/base.py", "import pytorch_lightning", "lit_vapo.stages.base -> pytorch_lightning"),
    ("stages/guards.py", "from transformers import AutoModel", "lit_vapo.stages.guards -> transformers"),
    ("objectives/base.py", "import peft.tuners", "lit_vapo.objectives.base -> peft"),
    ("metrics.py", "import datasets", "lit_vapo.metrics -> datasets"),
    ("cli.py", "import bitsandbytes", "lit_vapo.cli -> bitsandbytes"),
]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the package that lies in a folder."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_go_down_only() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


def test_wrong_imports_are_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "lit_vapo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, code, _ in WRONG:
        with (tmp_path / "lit_vapo" / file).open("a") as opened:
            opened.write(f"\n{code}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert " 0 kept" in done.stdout, "every contract should be able to fail"
    # Lines are broken where they are long.
    text = " ".join(done.stdout.split())
    assert [said for *_, said in WRONG if said not in text] == []


def graph(**how: bool) -> grimp.ImportGraph:
    """All imports of the package."""
    return grimp.build_graph("lit_vapo", include_external_packages=True, cache_dir=None, **how)


def test_the_ground_floor_is_torch_and_what_python_brings() -> None:
    found = graph()
    modules = {name for part in GROUND for name in {f"lit_vapo.{part}"} | found.find_descendants(f"lit_vapo.{part}")}
    foreign = {
        (name, imported)
        for name in modules
        for imported in found.find_modules_directly_imported_by(name)
        if imported.partition(".")[0] not in GROUND_LIBRARIES | {"lit_vapo"}
    }
    assert len(modules) > len(GROUND)
    assert foreign == set()


def test_what_is_for_type_checkers_is_not_loaded() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    excused = [line.split(" -> ") for contract in contracts for line in contract.get("ignore_imports", [])]
    excused = [(name, library) for name, library in excused if name.startswith("lit_vapo.rollout.")]
    loaded = graph(exclude_type_checking_imports=True)
    assert excused
    assert [pair for pair in excused if pair[1] in loaded.find_modules_directly_imported_by(pair[0])] == []


def test_files_stay_short() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert [f"{path}: {count} lines" for path, count in lines.items() if count > MAX_LINES] == []
