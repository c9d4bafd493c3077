"""`origin.json`: which checkpoint an exported folder was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from lit_vapo.integrity import contents_fingerprint
from lit_vapo.models.settings import STRICT, read_settings

ORIGIN_NAME = "origin.json"


class Origin(BaseModel):
    """What `origin.json` says.

    Attributes:
        stage: Stage of the run.
        checkpoint: Digest of its checkpoint.
    """

    model_config = STRICT

    stage: Annotated[str, Field(pattern="^[a-z]+$")]
    checkpoint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @classmethod
    def of(cls, stage: str, checkpoint: Path) -> Origin:
        """The origin of what is made of a checkpoint."""
        return cls(stage=stage, checkpoint=contents_fingerprint(checkpoint.resolve()))

    def text(self) -> str:
        """What the file holds."""
        return self.model_dump_json(indent=2) + "\n"


def read_origin(folder: str | Path) -> Origin | None:
    """Where an exported folder comes from, if it says so.

    Raises:
        ValueError: The file says something else.
    """
    path = Path(folder) / ORIGIN_NAME
    return read_settings(path, Origin) if path.is_file() else None
