"""The wheel: it holds the whole package, and what is in it runs away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from lit_vapo import __version__

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A folder with the contents of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source, built, out = folder / "source", folder / "built", folder / "unpacked"
    shutil.copytree(ROOT / "lit_vapo", source / "lit_vapo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, built], cwd=source, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"lit_vapo-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(out)
    return out


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_it_holds_the_package_and_nothing_else(unpacked):
    assert files(unpacked / "lit_vapo") == files(ROOT / "lit_vapo")
    (about,) = [path for path in unpacked.iterdir() if path.name != "lit_vapo"]
    assert about.name == f"lit_vapo-{__version__}.dist-info"
    assert "lit-vapo = lit_vapo.cli:main" in (about / "entry_points.txt").read_text()


def test_it_runs_away_from_the_checkout(unpacked, tmp_path):
    def run(*words):
        environment = {**os.environ, "PYTHONPATH": str(unpacked)}
        command = [sys.executable, "-c", "from lit_vapo.cli import main; main()", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [sys.executable, "-c", "import lit_vapo; print(lit_vapo.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(unpacked)}, capture_output=True)
    assert Path(found.stdout.decode().strip()) == unpacked / "lit_vapo/__init__.py"
    assert run("--version") == f"lit-vapo {__version__}\n"
    assert run("--help").startswith("usage: lit-vapo ")
    # Read off the source.
    assert "VarianceAware" in run("ppo", "fit", "--help")
    # Made of a template.
    logs = tmp_path / "run/logs/version_0"
    logs.mkdir(parents=True)
    (logs / "config.yaml").write_text(yaml.safe_dump({"model": {"base": {"path": "a/model"}, "head": None}}))
    run("report", "run")
    assert "a/model" in (tmp_path / "run/report.html").read_text()
