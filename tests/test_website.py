"""The site has every page, and links that leave docs/ lead somewhere in it."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def website():
    spec = importlib.util.spec_from_file_location("website", ROOT / "scripts/website.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation(website):
    named = [name for names in website.SECTIONS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) == {"index", *(page.stem for page in (ROOT / "docs").glob("*.md"))}


def test_a_link_out_of_the_docs_takes_its_file_along(website, tmp_path):
    page = tmp_path / "docs" / "data.md"
    page.parent.mkdir()
    page.write_text("[a](../configs/ppo/start.yaml) [b](runs.md#resume) [c](../CONTRIBUTING.md) [d](https://x.org/y)")
    text = website._linked(page, ROOT / "docs/data.md", tmp_path / "docs")
    assert (
        text == "[a](files/configs/ppo/start.yaml) [b](runs.md#resume) [c](files/CONTRIBUTING.txt) [d](https://x.org/y)"
    )
    assert (tmp_path / "docs/files/configs/ppo/start.yaml").read_text() == (ROOT / "configs/ppo/start.yaml").read_text()
    assert (tmp_path / "docs/files/CONTRIBUTING.txt").is_file()


def test_every_part_of_the_interface_exists(website):
    import importlib

    for names in website.API.values():
        for name in names:
            module, _, last = f"lit_vapo.{name}".rpartition(".")
            assert hasattr(importlib.import_module(module), last) or importlib.import_module(f"lit_vapo.{name}")
