"""How often does the alarm ring for nothing, and what does it see? Features of known distributions, no language model.

    python benchmarks/alarm.py

A reference's N responses have H features, which are normal or have the tails of Student's t with 5 degrees of freedom;
the standard deviations of the features differ twentyfold. The alarm is fitted to them, as in a run. Printed is the
share of new responses beyond its bound, mean ± spread over 20 references: of the reference's own (false alarms), and of
such as are shifted by some standard deviations, along one direction drawn at random in whitened features, at the last
level. Beside it the false alarms of the bound χ²_H(1 - level), which takes mean and covariance for known. Twelve
minutes on a busy core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_vapo.functional import (
    chi_square_quantile,
    fit_spread,
    held_out_distances,
    outlier_bound,
    squared_distance,
)

REFERENCES, NEW = 20, 2000
LEVELS, SHIFTS = (0.05, 0.01), (4.0, 8.0, 16.0)
CASES = (("normal", 256, 64), ("normal", 256, 576), ("normal", 64, 576), ("t", 256, 576), ("t", 1024, 576))


def draw(kind: str, rows: int, width: int, shift: float = 0.0) -> Tensor:
    """Features (rows, width), float64; `shift` in standard deviations, each response in the same direction."""
    white = torch.randn(rows, width, dtype=torch.float64)
    if kind == "t":
        white = white * (3 / torch.distributions.Chi2(torch.tensor(5.0)).sample((rows, 1)).double()).sqrt()
    if shift:
        direction = torch.randn(width, dtype=torch.float64)
        white = white + shift * direction / direction.norm()
    return white * torch.linspace(0, 3, width, dtype=torch.float64).exp()


def shares(kind: str, rows: int, width: int) -> list[float]:
    """Shares beyond the bound: false alarms at each level, of χ²_H, and at the last level of each shift."""
    reference = draw(kind, rows, width)
    spread, own = fit_spread(reference), held_out_distances(reference)
    new = squared_distance(draw(kind, NEW, width), spread)
    bounds = [outlier_bound(own, level) for level in LEVELS]
    plain = chi_square_quantile(1 - LEVELS[-1], torch.tensor(float(width)))
    moved = [squared_distance(draw(kind, NEW, width, shift), spread) > bounds[-1] for shift in SHIFTS]
    return [float(x.double().mean()) for x in (*(new > bound for bound in bounds), new > plain, *moved)]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = [
        *(f"false alarms at {x:g}" for x in LEVELS),
        f"of χ²_H at {LEVELS[-1]:g}",
        *(f"shift {x:g}" for x in SHIFTS),
    ]
    print("| features | N | H | " + " | ".join(head) + " |")
    print("|" + " --- |" * (3 + len(head)))
    for case in CASES:
        found = torch.tensor([shares(*case) for _ in range(REFERENCES)])
        cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(found.mean(0), found.std(0), strict=True)]
        print("| " + " | ".join([*map(str, case), *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
