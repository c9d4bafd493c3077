"""A plan as text, and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_vapo.plan.draft import PARTS, Plan
from lit_vapo.plan.formulas import BANDWIDTH_USE, MARGIN, UTILISATION, fits
from lit_vapo.plan.gpus import GB, Gpu


def memory_table(plan: Plan) -> str:
    """Bytes of each phase by part, a row a phase."""
    rows = [["phase", *PARTS, "peak"]]
    for name, parts in plan.phases.items():
        rows.append([name, *(f"{x / GB:.2f}" for x in (*(parts[part] for part in PARTS), sum(parts.values())))])
    return _lines(rows)


def gpu_table(plan: Plan, gpus: Sequence[Gpu]) -> str:
    """Whether each GPU has the memory, and how long it takes, a row a GPU."""
    names = [phase.name for phase in plan.draft.phases]
    rows = [["GPU", "GB", "fits", *(f"{name} s" for name in names), "together s"]]
    for gpu in gpus:
        taken = plan.seconds(gpu)
        said = "yes" if fits(plan.peak, gpu.memory) else "no"
        times = [*(taken[name] for name in names), sum(taken.values())]
        rows.append([gpu.name, f"{gpu.memory / GB:.0f}", said, *(f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in times)])
    return _lines(rows)


def table(plan: Plan, gpus: Sequence[Gpu]) -> str:
    """All of a plan: memory, GPUs, and what it stands on."""
    return "\n\n".join(
        [
            f"GB (10^9 bytes) on each device at the peak of each phase:\n{memory_table(plan)}",
            f"Peak {plan.peak / GB:.1f} GB. A GPU fits if {MARGIN:.0%} of its memory stay free.\n"
            + gpu_table(plan, gpus),
            "\n".join(
                f"- {note}"
                for note in (
                    *plan.draft.notes,
                    f"times assume {UTILISATION:.0%} of a GPU's products and {BANDWIDTH_USE:.0%} of its bandwidth",
                )
            ),
        ]
    )


def figures(plan: Plan, gpus: Sequence[Gpu]) -> dict[str, Any]:
    """The same for programs: bytes and seconds."""
    return {
        "peak": plan.peak,
        "phases": plan.phases,
        "gpus": {
            gpu.name: {"memory": gpu.memory, "fits": fits(plan.peak, gpu.memory), "seconds": plan.seconds(gpu)}
            for gpu in gpus
        },
        "assumed": {"utilisation": UTILISATION, "bandwidth": BANDWIDTH_USE, "margin": MARGIN},
        "notes": plan.draft.notes,
    }


def _lines(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
