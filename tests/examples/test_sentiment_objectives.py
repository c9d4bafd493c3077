"""Objectives at the same KL: what is read off a run, how preferences are spoiled, and the table."""

import json

import numpy as np

from examples.sentiment.objectives import BASELINE, LEVELS, at_kl, noisy_pairs, table


def test_a_straight_run_is_read_off_exactly_and_only_as_far_as_it_went():
    kl = np.linspace(0, 3.2, 12)
    found = at_kl(kl, 0.5 + 0.1 * kl, (1.0, 2.5, 4.0))
    np.testing.assert_allclose(found[:2], [0.6, 0.75], rtol=1e-9)
    assert np.isnan(found[2])


def test_near_iterations_count_more():
    # A step at 2 nats: far below and above it the level's own side decides.
    kl = np.linspace(0, 4, 41)
    low, high = at_kl(kl, (kl > 2).astype(float), (0.5, 3.5))
    assert abs(low) < 0.12
    assert abs(high - 1) < 0.12


def test_the_share_of_wrong_labels_is_the_asked_one(tmp_path):
    source = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "p", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    for seed in (0, 0, 1):
        noisy_pairs(source, tmp_path / "out" / "noisy.jsonl", 20, 0.25, seed)
        drawn.append([json.loads(line) for line in (tmp_path / "out" / "noisy.jsonl").read_text().splitlines()])
    assert sum(row["chosen"].startswith("bad") for row in drawn[0]) == 5
    assert len({row["chosen"].split()[1] for row in drawn[0]}) == 20
    assert all(row["chosen"].split()[1] == row["rejected"].split()[1] for row in drawn[0])
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_table_compares_seed_by_seed_where_both_have_arrived():
    base = np.full((2, len(LEVELS)), 0.5)
    other = base + np.array([[0.1], [0.3]])
    other[0, -1] = np.nan
    lines = table({BASELINE: base, "Other": other}).splitlines()
    # Mean 0.2, standard error 0.1, t(0.975, 1) = 12.706.
    assert lines[3].endswith("| +0.200 (-1.071 … +1.471) |")
    assert lines[2].split(" | ")[1] == "0.500 ± 0.000"
    assert lines[3].split(" | ")[-2] == "–"
