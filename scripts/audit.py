"""Ask whether an installed package has a known vulnerability: `make audit`.

pip-audit does the work, in an environment of its own inside that of the project, so that it pins nothing there. A
vulnerability fails, unless pyproject.toml lists it with a reason (tool.audit.ignored). Where nobody answers, on a
machine without network for example, nothing is audited; that is said, and does not fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOL = Path(sys.prefix) / "audit"
SECONDS = 15
CODES = {"fine": 0, "unanswered": 0, "vulnerable": 1}


def ignored() -> dict[str, str]:
    """Known vulnerabilities that nothing can be done about, each with the reason."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: dict[str, str] = settings.get("tool", {}).get("audit", {}).get("ignored", {})
    for name, reason in found.items():
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"pyproject.toml, tool.audit.ignored: expected a reason for {name}, got {reason!r}")
    return found


def verdict(output: str, accepted: dict[str, str]) -> tuple[str, list[str]]:
    """What pip-audit's JSON says, as a word of `CODES` and lines to print.

    Args:
        output: What it wrote; anything else than JSON is no answer.
        accepted: Names of vulnerabilities that do not count, with reasons.
    """
    try:
        packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return "unanswered", ["audit: no answer from the service of known vulnerabilities; nothing was audited"]
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        return "unanswered", [f"audit: the service knows none of {len(packages)} packages; nothing was audited"]
    bad, lines = 0, []
    for package in asked:
        for found in package["vulns"]:
            names = [found["id"], *found.get("aliases", [])]
            reason = next((accepted[name] for name in names if name in accepted), None)
            bad += reason is None
            fixed = ", ".join(found.get("fix_versions", [])) or "no version"
            tail = f"repaired in {fixed}" if reason is None else f"accepted: {reason}"
            lines.append(f"audit: {package['name']} {package['version']}: {' '.join(names)}; {tail}")
    lines.append(
        f"audit: {len(asked)} packages asked about, {len(packages) - len(asked)} unknown, {bad} vulnerabilities"
    )
    return "vulnerable" if bad else "fine", lines


def pip_audit() -> list[str] | None:
    """The command, installed if need be; `None` where it cannot be."""
    python = TOOL / "bin" / "python"
    if not python.exists():
        venv.create(TOOL, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq", "pip-audit"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    return [str(python), "-m", "pip_audit"] if done.returncode == 0 else None


def main() -> int:
    """Audit the environment that this runs in; the exit code."""
    accepted = ignored()
    command = pip_audit()
    if command is None:
        print("audit: pip-audit cannot be installed here; nothing was audited")
        return 0
    command += ["--path", sysconfig.get_path("purelib"), "--format", "json", "--progress-spinner", "off"]
    command += ["--skip-editable", "--timeout", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    word, lines = verdict(done.stdout, accepted)
    print("\n".join(lines))
    return CODES[word]


if __name__ == "__main__":
    sys.exit(main())
