"""What docs/plan.md says was measured is what was measured."""

import json
from pathlib import Path

import pytest

from benchmarks.plan import cells, table
from lit_vapo.plan.gpus import GPUS

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = {name: json.loads((DOCS / "evidence" / f"{name}.json").read_text()) for name in ("plan", "plan_gpu")}
KINDS = [f"ppo, {kind}, {held}" for kind in ("LoRA", "full") for held in ("fp32", "bf16", "8-bit")]


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_the_table_is_that_of_the_record(record):
    assert table(record) in (DOCS / "plan.md").read_text()


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_plans_are_within_a_seventh_of_what_was_measured(record):
    assert all(abs(row["planned"] / row["measured"] - 1) <= 0.15 for row in record["cells"])
    assert {row["cell"] for row in record["cells"]} <= {name for name, _, _ in cells()}


def test_every_cell_was_measured_somewhere():
    measured = {row["cell"] for record in RECORDS.values() for row in record["cells"]}
    assert measured == {name for name, _, _ in cells()}
    assert {kind + saving for kind in KINDS for saving in ("", ", checkpointing")} <= measured


def test_the_page_names_every_gpu():
    text = (DOCS / "plan.md").read_text()
    assert all(name in text for name in GPUS)
