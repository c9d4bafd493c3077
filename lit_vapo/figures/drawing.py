"""What all pictures share: colours, style, and a file at the end.

Drawing goes to a `Figure` of its own, not through pyplot, so nothing global is left behind and no display is asked for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lit_vapo.folders import write_whole

# Okabe and Ito's colours, which colour-blind readers tell apart too.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8a8f98"
COLOURS = ("#000000", BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# `Any`, since from 3.11 on matplotlib types the keys one by one, and before it did not.
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "axes.edgecolor": GREY,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 9.5,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "savefig.dpi": 150,
}


@contextmanager
def drawing(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure of this size in inches, written to `path` at the end."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())
