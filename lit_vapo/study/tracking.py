"""A study in W&B: a run for each method in each setting, all in one group."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lit_vapo.study.execution import Results, Study
from lit_vapo.study.experiment import Record
from lit_vapo.trackers import Member, log_group


def track(study: Study, config: Mapping[str, Any], results: Results, project: str) -> None:
    """Log a study: means over repetitions at each point of the runs, and how they end.

    Args:
        study: The study.
        config: Its configuration; studies of one configuration are one group.
        results: What is known of it.
        project: Project of W&B.
    """
    same = json.dumps({key: config[key] for key in ("experiment", "seed")}, sort_keys=True, default=str)
    group = f"{Path(study.output).name}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"
    kept: dict[tuple[str, str], list[Record]] = {}
    for record in results.records:
        kept.setdefault((record.setting, record.method), []).append(record)
    members = [
        Member(method, setting, {**config, "setting": setting, "method": method}, _means(records), _ends(records))
        for (setting, method), records in kept.items()
    ]
    log_group(project, study.output, group, members)


def _means(records: Sequence[Record]) -> list[dict[str, float]]:
    """Means at each point, over the runs that come so far."""
    rows = []
    for point in range(max(len(record.kl) for record in records)):
        there = [record for record in records if point < len(record.kl)]
        gains = [record.true_return[point] - record.reference_return for record in there]
        rows.append({"study/kl": fmean(record.kl[point] for record in there), "study/gain": fmean(gains)})
    return rows


def _ends(records: Sequence[Record]) -> dict[str, float]:
    gains = [record.gain for record in records]
    risk = sum(gain < 0 for gain in gains) / len(gains)
    return {"study/final_gain": fmean(gains), "study/risk": risk, "study/repetitions": len(gains)}
