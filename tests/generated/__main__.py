"""Many generated inputs, and a table of what came of them.

Command:   python -m tests.generated --count 5000
"""

import argparse
import collections
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.generated.kinds import KINDS
from tests.generated.outcome import ACCEPTED, DEEP, FAULTS, HANG, REFUSED, UNCLEAR, WRONG
from tests.generated.processes import results

COLUMNS = (ACCEPTED, REFUSED, DEEP, WRONG, UNCLEAR, HANG)


def run(index, count, number):
    """Counts of outcomes of a kind, and its faults."""
    begun, counts, faults = time.monotonic(), collections.Counter(), []
    for word, said, case in results(index, count, number):
        counts[word] += 1
        if word in FAULTS:
            faults.append({"kind": KINDS[index].name, "seed": number, "fault": word, "said": said, "input": case})
            print(
                f"{KINDS[index].name}: {word}: {said.strip().splitlines()[-1 if word == DEEP else 0][:300]}",
                file=sys.stderr,
                flush=True,
            )
    print(f"{KINDS[index].name}: {dict(counts)}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return counts, faults


def table(counts):
    """Markdown: a line for each kind, and their sum."""
    rows = [[name, sum(found.values()), *(found[word] for word in COLUMNS)] for name, found in counts.items()]
    total = ["**all**", *(sum(row[i] for row in rows) for i in range(1, len(COLUMNS) + 2))]
    lines = [["input", "tried", *COLUMNS], ["---"] * (len(COLUMNS) + 2), *rows, total]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.generated", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=5000, help="inputs in all, shared out by the kinds' weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="only kinds whose names have this in them")
    parser.add_argument("--output", type=Path, help="where to write counts and faults (JSON)")
    given = parser.parse_args()
    chosen = [i for i, kind in enumerate(KINDS) if given.kinds in kind.name]
    weights = sum(KINDS[i].weight for i in chosen)
    shares = [-(-given.count * KINDS[i].weight // weights) for i in chosen]
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", WANDB_MODE="disabled")
    counts, faults = {KINDS[i].name: collections.Counter() for i in chosen}, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(run, i, share, given.seed): KINDS[i].name for i, share in zip(chosen, shares, strict=True)}
        for job in as_completed(jobs):
            counts[jobs[job]] = job.result()[0]
            faults += job.result()[1]
            if given.output is not None:
                record = {"seed": given.seed, "counts": counts, "faults": faults}
                given.output.write_text(json.dumps(record, indent=2) + "\n")
    print(table(counts))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
