"""Run as a script: starts commands of `lit-vapo` as processes that need not import anything any more.

Reads one command from each line, forks, and says the number of the process; says the exit code when it ends.
"""

import json
import os
import sys
import traceback


def prepare():
    """Import all that commands import; nothing is computed, so that no thread is there when processes are forked."""
    import torch

    import lit_vapo.commands.stages
    import lit_vapo.stages.ppo.module
    import lit_vapo.stages.reward.module
    import lit_vapo.stages.sft.module

    torch.set_num_threads(1)
    return lit_vapo


def work(command):
    """Be the process of a command."""
    descriptor = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(command["environment"])
    for line in command.get("before", ()):
        exec(line, {})
    sys.argv = ["lit-vapo", *command["words"]]
    from lit_vapo.cli import main

    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    prepare()
    print("ready", flush=True)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            work(json.loads(line))
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
