"""What libraries say at the start of a run and a user can do nothing about."""

from __future__ import annotations

import logging
import os
import warnings

WARNINGS = (
    # Lightning is handed arguments while the command line has some: the stage's name, here.
    ".*LightningCLI's args parameter is intended to run from within.*",
    # A folder that holds a run is refused before this, unless it is resumed.
    ".*Checkpoint directory .* exists and is not empty.*",
    # Nobody who sets nothing aside for validation needs to hear that nothing was.
    ".*Total length of `list` across ranks is zero.*",
    # Frozen models belong in evaluation mode, and a policy has no dropout, so its mode does not matter.
    ".*module\\(s\\) in eval mode at the start of training.*",
    # Between libraries: peft and transformers, Lightning and torch.
    ".*`is_gradient_checkpointing` is deprecated.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)
_as_python_does = warnings.formatwarning
# Advertisements, and a step that takes no time.
LINES = ("💡 Tip:", "TPU available: False", "Loading `train_dataloader` to estimate")


def silence() -> None:
    """Leave these out of what a run prints."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = _sentence
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _worth_a_line not in logger.filters:
        logger.addFilter(_worth_a_line)


def _sentence(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours in its own words; where in our files it stands helps nobody. Those of others as ever."""
    if category is UserWarning and f"{os.sep}lit_vapo{os.sep}" in filename:
        return f"warning: {message}\n"
    return _as_python_does(message, category, filename, lineno, line)


def _worth_a_line(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LINES)
