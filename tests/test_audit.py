"""What `make audit` makes of pip-audit's answer, or of none."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUND = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.1", "3.0"], "description": "bad"}
SOUND = {"name": "numpy", "version": "2.0", "vulns": []}
BAD = {"name": "jinja2", "version": "2.0", "vulns": [FOUND]}
SILENCE = "audit: no answer from the service of known vulnerabilities; nothing was audited"
UNKNOWN = {"name": "mine", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(*packages):
    return json.dumps({"dependencies": packages, "fixes": []})


@pytest.mark.parametrize(
    ("output", "accepted", "word", "said"),
    [
        (answer(SOUND, UNKNOWN), {}, "fine", "audit: 1 packages asked about, 1 unknown, 0 vulnerabilities"),
        (answer(SOUND, BAD), {}, "vulnerable", "audit: jinja2 2.0: PYSEC-1 CVE-1; repaired in 2.1, 3.0"),
        (answer(BAD), {"CVE-1": "not called"}, "fine", "audit: jinja2 2.0: PYSEC-1 CVE-1; accepted: not called"),
        (
            answer(BAD),
            {"CVE-2": "another"},
            "vulnerable",
            "audit: 1 packages asked about, 0 unknown, 1 vulnerabilities",
        ),
        (answer(UNKNOWN), {}, "unanswered", "audit: the service knows none of 1 packages; nothing was audited"),
        ("", {}, "unanswered", SILENCE),
        (
            "Traceback …",
            {},
            "unanswered",
            "audit: no answer from the service of known vulnerabilities; nothing was audited",
        ),
    ],
)
def test_an_answer_is_judged(audit, output, accepted, word, said):
    found, lines = audit.verdict(output, accepted)
    assert found == word
    assert said in lines


@pytest.mark.parametrize(("output", "code"), [(answer(SOUND), 0), (answer(BAD), 1), ("ERROR: no network", 0)])
def test_only_a_found_vulnerability_fails(audit, monkeypatch, capsys, output, code):
    asked = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0 if "pip" in command else 1, output, "")

    monkeypatch.setattr(audit.subprocess, "run", run)
    monkeypatch.setattr(audit.venv, "create", lambda *args, **options: None)
    assert audit.main() == code
    assert "audit: " in capsys.readouterr().out
    assert "pip_audit" in asked[1]


def test_without_the_tool_nothing_is_audited_and_nothing_fails(audit, monkeypatch, capsys):
    monkeypatch.setattr(audit.subprocess, "run", lambda command, **o: subprocess.CompletedProcess(command, 1, "", "no"))
    monkeypatch.setattr(audit.venv, "create", lambda *args, **options: None)
    assert audit.main() == 0
    assert "nothing was audited" in capsys.readouterr().out


def test_what_is_accepted_has_a_reason(audit, tmp_path, monkeypatch):
    audit.ignored()
    (tmp_path / "pyproject.toml").write_text('[tool.audit.ignored]\n"CVE-1" = " "\n')
    monkeypatch.setattr(audit, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"tool.audit.ignored: expected a reason for CVE-1, got ' '"):
        audit.ignored()


def test_continuous_integration_audits():
    assert " audit" in (ROOT / ".ci" / "run").read_text()
    assert "\naudit: setup ## " in (ROOT / "Makefile").read_text()
