"""What a folder or a checkpoint may run: classes of this package, and what the user named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lit_vapo
from lit_vapo.models.exported import same_place
from lit_vapo.models.settings import every_dict, shortened

PACKAGE = Path(lit_vapo.__file__).resolve().parent


def check_trusted(settings: Any, trust: Sequence[str] | None, asker: str) -> None:
    """Refuse settings that ask for code which nobody here vouches for, before anything is imported.

    Code of this package is free. Every other `class_path`, and every model with `trust_remote_code`, must be named.

    Args:
        settings: What a folder or a checkpoint says, as dicts, lists, texts and numbers.
        trust: What the user allows: classes or packages by their Python name, models by folder or hub name.
        asker: Whose settings they are, for the message.

    Raises:
        ValueError: They ask for something that is not allowed, or there is no end to them.

    Examples:
        >>> check_trusted({"class_path": "lit_vapo.objectives.mean_reward.MeanReward"}, None, "a checkpoint")
        >>> check_trusted({"class_path": "mine.Head"}, ["mine"], "a checkpoint")
    """
    allowed = list(trust or [])
    for part in every_dict(settings, asker):
        if "class_path" in part and not _is_own(part["class_path"]):
            name = part["class_path"]
            if not any(name == x or str(name).startswith(f"{x}.") for x in allowed):
                raise ValueError(
                    f"{asker}: expected classes of lit_vapo, got class_path {shortened(name)}, whose code would run. "
                    + _how(name)
                )
        if part.get("trust_remote_code") not in (None, False):
            path = part.get("path")
            if not any(same_place(path, x) for x in allowed):
                raise ValueError(
                    f"{asker}: expected models without code of their own, got trust_remote_code for {shortened(path)}. "
                    + _how(path)
                )


def _is_own(class_path: Any) -> bool:
    """Whether a name is that of something in a file of this package, which does nothing when it is imported."""
    parts = str(class_path).split(".")
    if len(parts) < 3 or parts[0] != PACKAGE.name or not all(x.isidentifier() and x[0] != "_" for x in parts):
        return False
    module = PACKAGE.joinpath(*parts[1:-1])
    return module.with_suffix(".py").is_file() or (module / "__init__.py").is_file()


def _how(name: Any) -> str:
    return (
        "If you know this code and want it to run, allow it by name: "
        f"trust=[{shortened(name)}] in Python, --trust='[{name}]' on the command line (--model.trust in the ppo stage)."
    )
