"""Build the documentation as a site: `make site` writes it to build/docs/site.

Zensical does the work, strictly: a warning fails. It lives in an environment of its own inside that of the project, so
that it pins nothing there. Where nobody answers, on a machine without network for example, nothing is built; that is
said, and does not fail.

Pages are README.md and docs/ as they are. What they link to outside of docs/ (configs, notebooks) goes along. Pages of
the Python interface are made of docstrings.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.prefix) / "site"
# Pinned: a new version may warn of what this one does not.
NEEDED = ("zensical==0.0.73", "mkdocstrings==1.0.8", "mkdocstrings-python==2.0.11", "mkdocs-autorefs==1.4.5")
SOURCE = ROOT / "build/docs"
SITE = SOURCE / "site"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
SECTIONS: dict[str, tuple[str, ...]] = {
    "Get started": ("index", "data", "runs", "from_trl"),
    "Guides": ("rewards", "estimators", "objectives", "ppo", "policies", "reports", "generation"),
    "Scale": ("scaling", "plan", "cloud", "speed", "faults"),
    "Concepts": ("architecture", "evidence", "reliability", "trust"),
    "Reference": ("metrics",),
}
API = {
    "Stages": ("stages.sft.module.SFTModule", "stages.reward.module.RewardModule", "stages.ppo.module.PPOModule"),
    "Data": ("data.datamodule.PreferenceDataModule", "data.datamodule.PromptDataModule"),
    "Settings": (
        "models.pretrained.Pretrained",
        "models.pretrained.Lora",
        "models.generation.Sampling",
        "models.critic.CriticSpec",
        "stages.ppo.update.UpdateSettings",
    ),
    "Objectives": ("objectives",),
    "Advantages": ("advantages",),
    "Rewards": ("rewards", "rewards.reward_model.RewardModel", "rewards.members"),
    "Mathematics": ("functional",),
}


def main() -> None:
    """Write the source of the site, and build it."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = SOURCE / "docs"
    shutil.copytree(ROOT / "docs", pages)
    shutil.copy(ROOT / "README.md", pages / "index.md")
    for page in sorted(pages.rglob("*.md")):
        origin = ROOT / "README.md" if page == pages / "index.md" else ROOT / "docs" / page.relative_to(pages)
        page.write_text(_linked(page, origin, pages), encoding="utf-8")
    names = _write_api(pages / "api")
    (SOURCE / "mkdocs.yml").write_text(_settings(pages, names), encoding="utf-8")
    if not _installed():
        print(f"site: {' and '.join(NEEDED)} could not be installed; nothing was built")
        return
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    tool = TOOL / "bin/zensical"
    built = subprocess.run(
        [tool, "build", "--strict", "-f", "mkdocs.yml"], cwd=SOURCE, env=os.environ | {"PYTHONPATH": path}
    )
    if built.returncode:
        raise SystemExit(built.returncode)
    print(f"site: {SITE}/index.html")


def _linked(page: Path, origin: Path, pages: Path) -> str:
    """A page whose links lead to where things are in the site."""

    def moved(found: re.Match[str]) -> str:
        target = (origin.parent / found[1]).resolve()
        docs = ROOT / "docs"
        if target.is_relative_to(docs):
            there = pages / target.relative_to(docs)
        elif target == ROOT / "README.md" or target.is_dir():
            there = pages / "index.md"
        else:
            there = pages / "files" / target.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            # A page of Markdown would have links of its own.
            there = there.with_suffix(".txt") if there.suffix == ".md" else there
            shutil.copy(target, there)
        return os.path.relpath(there, page.parent)

    return LINK.sub(moved, page.read_text(encoding="utf-8"))


def _write_api(folder: Path) -> list[str]:
    folder.mkdir()
    for title, names in API.items():
        blocks = "\n\n".join(f"::: lit_vapo.{name}" for name in names)
        (folder / f"{title.lower()}.md").write_text(f"# {title}\n\n{blocks}\n", encoding="utf-8")
    return [title.lower() for title in API]


def _settings(pages: Path, api: list[str]) -> str:
    def lines() -> Iterator[str]:
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("version", "")
        yield f"site_name: lit-vapo {version}".rstrip()
        yield "docs_dir: docs"
        yield f"site_dir: {SITE.name}"
        yield "use_directory_urls: false"
        yield "theme: {name: material, features: [navigation.sections, content.code.copy]}"
        yield "plugins:"
        yield "  - search"
        yield "  - mkdocstrings:"
        yield f"      handlers: {{python: {{paths: ['{ROOT}'], options: {{show_root_heading: true, show_source: false, "
        yield "        docstring_style: google, members_order: source, show_submodules: true}}}"
        yield "nav:"
        for title, names in SECTIONS.items():
            yield f"  - {title}:"
            yield from (f"    - {name}.md" for name in names)
            if title == "Concepts":
                yield from (f"    - {page.relative_to(pages)}" for page in sorted((pages / "evidence").glob("*.md")))
            if title == "Reference":
                yield from (f"    - api/{name}.md" for name in api)

    return "\n".join(lines()) + "\n"


def _installed() -> bool:
    """Whether the tool is there, after an attempt to fetch it."""
    if not (TOOL / "bin/zensical").is_file():
        venv.create(TOOL, with_pip=True)
        done = subprocess.run([TOOL / "bin/pip", "install", "-q", *NEEDED], capture_output=True)
        return done.returncode == 0
    return True


if __name__ == "__main__":
    main()
