"""HelpSteer's ratings as preferences: of the responses to a prompt, the most and the least helpful one.

    python -m examples.helpsteer.prepare --output runs/helpsteer

The sets (nvidia/HelpSteer2, nvidia/HelpSteer) give every response a rating of its own, from 0 to 4. The difference of
two is the pair's margin; two equal ones are a tie. Prompts whose turns are written with markers of a model
(`<extra_id_1>`) are left out: another model's template would read them as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from lit_vapo.folders import write_whole

MARKER = "<extra_id_"


def pairs(rows: Iterable[Mapping[str, Any]], rating: str) -> Iterator[dict[str, Any]]:
    """Preferences as messages, from rows in which the responses to a prompt stand together.

    Args:
        rows: Rows with `prompt`, `response` and a rating.
        rating: The column of the rating.
    """
    for prompt, group in groupby(rows, key=lambda row: row["prompt"]):
        found = sorted(group, key=lambda row: float(row[rating]))
        if len(found) < 2 or MARKER in prompt:
            continue
        worst, best = found[0], found[-1]
        margin = float(best[rating]) - float(worst[rating])
        yield {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": best["response"]}],
            "rejected": [{"role": "assistant", "content": worst["response"]}],
            **({"margin": margin} if margin else {"tie": True}),
        }


def prepare(output: str, source: str = "nvidia/HelpSteer2", rating: str = "helpfulness") -> None:
    """Write `train.jsonl` and `validation.jsonl`.

    Args:
        output: Folder for them.
        source: Name of the set on the hub.
        rating: Which rating decides.
    """
    from datasets import load_dataset

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        lines = (
            json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs(load_dataset(source, split=split), rating)
        )
        write_whole(folder / f"{split}.jsonl", "".join(lines))


if __name__ == "__main__":
    auto_cli(prepare, as_positional=False)
