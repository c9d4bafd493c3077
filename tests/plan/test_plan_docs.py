"""What docs/plan.md says was measured is what was measured."""

import json
from pathlib import Path

from benchmarks.plan import cells, table
from lit_vapo.plan.gpus import GPUS

DOCS = Path(__file__).parents[2] / "docs"
RECORD = json.loads((DOCS / "evidence" / "plan.json").read_text())


def test_the_table_is_that_of_the_record():
    assert table(RECORD) in (DOCS / "plan.md").read_text()


def test_plans_are_within_a_seventh_of_what_was_measured():
    assert all(abs(row["planned"] / row["measured"] - 1) <= 0.15 for row in RECORD["cells"])
    measured = {row["cell"] for row in RECORD["cells"]}
    assert measured <= {name for name, _, _ in cells()}
    # With and without checkpointing each.
    assert {f"ppo, {kind}, {held}" for kind in ("LoRA", "full") for held in ("fp32", "bf16")} <= measured


def test_the_page_names_every_gpu():
    text = (DOCS / "plan.md").read_text()
    assert all(name in text for name in GPUS)
