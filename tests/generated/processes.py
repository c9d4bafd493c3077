"""Inputs in processes of their own, which are ended where an input takes too long."""

import logging
import multiprocessing

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.generated.kinds import KINDS
from tests.generated.outcome import DEEP, HANG, outcome

SECONDS, START = 10, 600
# Each process makes its own models: a fork would inherit threads.
METHOD = "spawn"


def inputs(kind, count, number):
    """The first `count` inputs of a kind from a seed; the same each time."""
    found = []

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.cases)
    def collect(case):
        found.append(case)

    collect()
    return found


def work(index, count, number, start, pipe):
    """Try the inputs of one kind from the one numbered `start` on; say of each that it begins, and what came of it."""
    kind = KINDS[index]
    logging.disable(logging.WARNING)
    for at, case in enumerate(inputs(kind, count, number)):
        if at >= start:
            pipe.send((at, None, None))
            found = outcome(kind, case)
            pipe.send((at, found, repr(case) if found.fault else ""))
    pipe.send(None)


def results(index, count, number):
    """What came of each input of a kind; one that takes too long is ended with its process, and another goes on."""
    context, start, ready = multiprocessing.get_context(METHOD), 0, False
    while True:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(index, count, number, start, theirs), daemon=True)
        process.start()
        theirs.close()
        begun = None
        try:
            # The first input of a process waits for what is made once.
            while ours.poll(SECONDS if ready else START):
                message = ours.recv()
                if message is None:
                    process.join()
                    return
                begun, found, case = message
                ready = ready or found is not None
                if found is not None:
                    yield found.word, found.said, case
            word, said = HANG, f"more than {SECONDS if ready else START} s"
        except EOFError:
            word, said = DEEP, "the process died"
        process.kill()
        process.join()
        if begun is None:
            raise RuntimeError(f"{KINDS[index].name}: no input was begun ({said})")
        yield word, said, f"input {begun}"
        start, ready = begun + 1, False
