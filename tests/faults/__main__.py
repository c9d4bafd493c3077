"""Kill every kind of run at random moments, resume it, and compare: `python -m tests.faults --count 20`."""

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.kinds import KINDS, World
from faults.runs import Server, after, differences, left


def try_kind(kind, world, server, folder, count, seed, tell=print):
    """Kill a run `count` times; the number of resumed runs that ended otherwise than the one that was never stopped."""
    folder.mkdir()
    whole, log = folder / "whole", folder / "log.txt"
    code, seconds = server.run(world.words(kind, whole, "--resume"), log)
    if code:
        raise AssertionError(log.read_text())
    expected, wrong = left(whole), 0
    chance = random.Random(f"{seed}/{kind}")
    for number in range(count):
        run = folder / f"killed-{number}"
        words, kills, log = world.words(kind, run, "--resume"), [], folder / f"log-{number}.txt"
        moment = chance.uniform(0, seconds)
        code, _ = server.run(words, log, after(moment))
        while code == -9 and len(kills) < 3:
            kills.append(round(moment, 2))
            # Now and then the resumed run is killed, too.
            moment = chance.uniform(0, seconds) if chance.random() < 0.3 and len(kills) < 3 else None
            code, _ = server.run(words, log, None if moment is None else after(moment))
        found = differences(left(run), expected) if code == 0 else [f"exit code {code}: {log.read_text()[-2000:]}"]
        wrong += bool(found)
        tell(
            f"{kind} {number}: killed after {kills or 'its end'} of {seconds:.1f} s: {found[:4] or 'the same'}",
            flush=True,
        )
        if not found:
            shutil.rmtree(run)
    return wrong


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kinds", nargs="*", default=list(KINDS))
    options.add_argument("--accelerator", default="cpu")
    options.add_argument("--folder", type=Path, default=None)
    given = options.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    server, world = Server(), World(folder, given.accelerator)
    world.make_ensemble(server, folder / "log.txt")
    wrong = {}
    for kind in given.kinds:
        try:
            wrong[kind] = try_kind(kind, world, server, folder / kind, given.count, given.seed)
        except AssertionError as error:
            print(f"{kind}: {str(error)[-3000:]}", flush=True)
            wrong[kind] = given.count
    print(f"{sum(wrong.values())} of {given.count * len(wrong)} ended otherwise: {wrong}")
    sys.exit(bool(sum(wrong.values())))
