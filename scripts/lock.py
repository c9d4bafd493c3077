"""Pin every package of the image, with the digests of its files: `make lock`.

uv does the work, in an environment of its own inside that of the project. It takes what `pyproject.toml` asks for with
the extra `study`, and the versions of `constraints-cpu.txt`, which the tests run with. The result is two files in
`locks/`: `common.txt`, and `cuda.txt` with torch and what only its CUDA build needs. A CPU's image takes torch from
elsewhere. Run it after a change of either file; a test compares the digest in the header.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
TOOL = Path(sys.prefix) / "lock"
EXTRA = "study"
CONSTRAINTS = "constraints-cpu.txt"
# The oldest Python of pyproject.toml; markers in the files tell what others need.
PYTHON = "3.11"
# Packages that a torch for CPUs does not ask for.
CUDA = re.compile(r"torch==|triton==|nvidia-|cuda-")
HEADER = "# Made by `make lock` from pyproject.toml and {constraints}; do not edit.\n# Of these: {digest}\n"


def asked(root: Path = ROOT) -> list[str]:
    """What the image needs, as pyproject.toml says it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"][EXTRA]]


def pins(text: str) -> dict[str, str]:
    """Versions by the names of packages, as a file of pins has them; of several, for different Pythons, the first."""
    found: dict[str, str] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE):
        found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return found


def digest(root: Path = ROOT) -> str:
    """What tells the locks of other dependencies or versions from these."""
    versions = pins((root / CONSTRAINTS).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps([asked(root), versions], sort_keys=True).encode()).hexdigest()


def divided(resolved: str) -> tuple[str, str]:
    """The lines of all images, and those of CUDA images alone, of uv's output."""
    parts = re.split(r"^(?=[A-Za-z0-9])", resolved, flags=re.MULTILINE)
    cuda = [part for part in parts if CUDA.match(part)]
    return "".join(part for part in parts if part not in cuda), "".join(cuda)


def uv() -> list[str]:
    """The command, installed if need be."""
    python = TOOL / "bin" / "python"
    if not python.exists():
        venv.create(TOOL, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq", "uv"]
        subprocess.run(pip, check=True)
    return [str(python), "-m", "uv"]


def main() -> int:
    """Write both files; the exit code."""
    command = [*uv(), "pip", "compile", "--quiet", "--universal", "--python-version", PYTHON, "--generate-hashes"]
    command += ["--no-annotate", "--no-header", "--constraint", CONSTRAINTS, "--extra", EXTRA, "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return done.returncode
    LOCKS.mkdir(exist_ok=True)
    header = HEADER.format(constraints=CONSTRAINTS, digest=digest())
    for name, lines in zip(("common.txt", "cuda.txt"), divided(done.stdout), strict=True):
        (LOCKS / name).write_text(header + lines, encoding="utf-8")
        print(f"lock: {len(pins(lines))} packages in locks/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
