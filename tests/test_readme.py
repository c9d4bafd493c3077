"""What README and docs show must work: their Python runs, and their commands name things that exist."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from lit_vapo.cli import COMMANDS, following

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIG_OPTIONS = {"--config", "--trainer", "--data", "--model"}


def blocks(text: str, *languages: str) -> list[str]:
    """Bodies of the fenced blocks in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [body for language, body in found if language in languages]


def commands(block: str) -> list[list[str]]:
    """Commands of a shell block, as words: prompts, comments, continuations and output left aside.

    In a block with `$` prompts only the lines with a prompt are commands.
    """
    lines = block.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return found


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", makefile, re.M))


def problems(words: list[str], root: Path, targets: set[str]) -> list[str]:
    """What is wrong with one command, as far as files and names tell."""
    while words and "=" in words[0]:  # VARIABLE=value before the command
        words = words[1:]
    if not words:
        return []
    program, arguments = Path(words[0]).name, words[1:]
    if program == "make":
        wanted = [word for word in arguments if "=" not in word and not word.startswith("-")]
        return [f"make has no target {word!r}" for word in wanted if word not in targets]
    if program.startswith("python") and arguments[:1] == ["-m"]:
        path = root / arguments[1].replace(".", "/")
        local = (root / arguments[1].split(".")[0]).is_dir()
        missing = local and not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file()
        return [f"no module {arguments[1]}"] if missing else []
    if program == "docker" and "run" in arguments[:1] and "lit-vapo" in arguments:
        return problems(arguments[arguments.index("lit-vapo") :], root, targets)
    return stage_problems(arguments, root) if program == "lit-vapo" else []


def stage_problems(arguments: list[str], root: Path) -> list[str]:
    """What is wrong with the arguments of `lit-vapo`."""
    found = []
    first, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    known = following(first)
    if first not in {name.split()[0] for name in COMMANDS} | {"--help", "--version"}:
        found.append(f"lit-vapo has no command {first!r}")
    elif known and rest[:1] not in [[word] for word in (*known, "--help")]:
        found.append(f"lit-vapo {first} has no command {rest[:1]}")
    joined = (tuple(word.split("=", 1)) for word in arguments if "=" in word)
    for option, value in [*joined, *pairwise(arguments)]:
        if option in CONFIG_OPTIONS and value.startswith("configs/") and not (root / value).is_file():
            found.append(f"no file {value}")
    return found


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    """Each block in a process of its own: it must stand alone, and contract tests must not find its classes.

    What `print(…)  # output` promises is compared with what comes.
    """
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, f"{code}\n{run.stderr}"
        assert run.stdout.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, re.M)


def test_every_command_of_the_docs_names_what_exists() -> None:
    targets = make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = [words for block in blocks(pages, "bash", "console", "sh") for words in commands(block)]
    assert [f"{' '.join(words)}: {p}" for words in found for p in problems(words, ROOT, targets)] == []


def test_the_readme_has_python_to_run(readme: str) -> None:
    assert blocks(readme, "python")


def test_commands_name_what_exists(readme: str) -> None:
    targets = make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    found = [words for block in blocks(readme, "bash", "console", "sh") for words in commands(block)]
    assert any(words[0] == "make" for words in found)
    assert any(words[0] == "lit-vapo" for words in found)
    wrong = [f"{' '.join(words)}: {p}" for words in found for p in problems(words, ROOT, targets)]
    assert wrong == []


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    kept = ("".join(c for c in h.lower() if c.isalpha() or c.isdecimal() or c in "_- ") for h in headings)
    return {heading.replace(" ", "-") for heading in kept}


def lost_links(page: Path) -> list[str]:
    """Links and pictures of a page that lead to no file, or to no heading of one."""
    text = page.read_text(encoding="utf-8")
    targets = [a or b for a, b in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)]
    lost = []
    for target in targets:
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (heading and heading not in anchors(file.read_text(encoding="utf-8"))):
            lost.append(target)
    return lost


def test_links_lead_to_files_and_headings(tmp_path: Path) -> None:
    assert {str(page): lost for page in PAGES if (lost := lost_links(page))} == {}
    (tmp_path / "a.md").write_text("# One, and σ² of it\n[x](#one-and-σ-of-it) [y](#two) [z](b.md) [w](a.md#three)\n")
    assert lost_links(tmp_path / "a.md") == ["#two", "b.md", "a.md#three"]


def test_named_configs_exist(readme: str) -> None:
    """Files under configs/ named anywhere, in tables too."""
    named = set(re.findall(r"configs/[\w./-]+\.yaml", readme))
    assert named
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []


def test_named_classes_exist(readme: str) -> None:
    named = set(re.findall(r"\blit_vapo(?:\.[a-z_]\w*)+\.[A-Z]\w*", readme))
    assert named
    for name in sorted(named):
        module, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("make tset", "make has no target 'tset'"),
        ("make demo PYTHON=python3.12", None),
        ("lit-vapo pppo fit", "lit-vapo has no command 'pppo'"),
        ("lit-vapo ppo train", "lit-vapo ppo has no command ['train']"),
        ("lit-vapo data fit", "lit-vapo data has no command ['fit']"),
        ("lit-vapo data show my/pairs.jsonl", None),
        ("lit-vapo study fit", "lit-vapo study has no command ['fit']"),
        ("lit-vapo study run --config configs/there.yaml", None),
        ("lit-vapo ppo fit --config configs/none.yaml", "no file configs/none.yaml"),
        ("lit-vapo ppo fit --config=configs/none.yaml", "no file configs/none.yaml"),
        ("lit-vapo ppo fit --config my/own.yaml --trainer configs/there.yaml", None),
        ("WANDB_MODE=offline lit-vapo pppo fit", "lit-vapo has no command 'pppo'"),
        ("docker run --rm lit-vapo ppo fit --config configs/none.yaml", "no file configs/none.yaml"),
        ("python -m examples.none.prepare", "no module examples.none.prepare"),
        ("python -m pip install x", None),
    ],
)
def test_checker(tmp_path: Path, command: str, expected: str | None) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "there.yaml").touch()
    (words,) = commands(command)
    found = problems(words, tmp_path, targets={"demo", "test"})
    assert found == ([] if expected is None else [expected])


def test_commands_are_read_as_a_shell_would() -> None:
    block = "git clone x && cd y  # a comment\nlit-vapo ppo \\\n  fit\n"
    assert commands(block) == [["git", "clone", "x"], ["cd", "y"], ["lit-vapo", "ppo", "fit"]]
    assert commands("$ make demo\nsome output\n") == [["make", "demo"]]
