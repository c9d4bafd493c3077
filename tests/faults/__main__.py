"""Kill every kind of run at random moments, resume it, and compare: `python -m tests.faults --count 20`."""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.kinds import KINDS, World
from faults.runs import Server, after, differences, left


def saved(run):
    """How many iterations the newest checkpoint of a run has."""
    return max((int(path.stem.partition("=")[2]) for path in run.glob("checkpoints/iteration=*.ckpt")), default=0)


def random_moment(chance, run, seconds, length):
    """Kills a run at any moment; more often than not at one that is counted from an iteration, since it trains then."""
    if chance.random() < 0.2:
        return after(chance.uniform(0, seconds))
    iteration, more = chance.randint(saved(run) + 1, max(length, saved(run) + 1)), chance.uniform(0, 0.15)

    def kill(process):
        while saved(run) < iteration and Path(f"/proc/{process}").exists():
            time.sleep(0.001)
        after(more)(process)

    return kill


def try_kind(kind, world, server, folder, count, seed):
    """Kill a run `count` times, and resume each.

    Returns:
        How often it was killed, how often with a checkpoint and something left to do, and how many of the resumed runs
        ended otherwise than the one that was never stopped.
    """
    folder.mkdir()
    whole, log = folder / "whole", folder / "log.txt"
    code, seconds = server.run(world.words(kind, whole, "--resume"), log)
    if code:
        raise AssertionError(log.read_text())
    expected, length = left(whole), saved(whole)
    chance = random.Random(f"{seed}/{kind}")
    killed = midway = wrong = 0
    for number in range(count):
        run, log, moments = folder / f"killed-{number}", folder / f"log-{number}.txt", []
        words = world.words(kind, run, "--resume")
        code, took = server.run(words, log, random_moment(chance, run, seconds, length))
        while code == -9:
            moments.append(f"{took:.2f} s (iteration {saved(run)})")
            killed += 1
            midway += 0 < saved(run) < length
            # Now and then the resumed run is killed, too.
            again = chance.random() < 0.3 and len(moments) < 3
            kill = random_moment(chance, run, seconds, length) if again else None
            code, took = server.run(words, log, kill)
        found = differences(left(run), expected) if code == 0 else [f"exit code {code}: {log.read_text()[-2000:]}"]
        wrong += bool(found)
        when = f"killed after {', '.join(moments)}" if moments else "was faster"
        print(f"{kind} {number}: {when} of {seconds:.1f} s: {found[:4] or 'the same'}", flush=True)
        if not found:
            shutil.rmtree(run)
    return killed, midway, wrong


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
    rows, failed = [], 0
    for kind in given.kinds:
        try:
            killed, midway, wrong = try_kind(kind, world, server, folder / kind, given.count, given.seed)
            rows.append(f"| {kind} | {killed} | {midway} | {wrong} |")
        except AssertionError as error:
            wrong = given.count
            print(f"{kind}: {str(error)[-3000:]}", flush=True)
        failed += wrong
    print("| run | kills | with a checkpoint and iterations left | ended otherwise |\n| --- | --- | --- | --- |")
    print("\n".join(rows))
    sys.exit(bool(failed))
