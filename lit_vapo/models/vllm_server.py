"""A vLLM server in an environment and a process of its own, which ends with us, however we end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HOST = "127.0.0.1"
# Seconds that a server has to end by itself.
GRACE = 10.0
PAUSE = 0.5
# How Python ends the report of an error.
ERROR = re.compile(r"\b\w*(Error|Exception): ")
# Ranks that vLLM makes room for.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# Leads the server's process group. A server that dies leaves its workers behind, and so would we if we were killed:
# then the pipe from us closes, and the whole group is ended.
_LEADER = """
import os, signal, subprocess, sys, threading
def end():
    os.killpg(0, signal.SIGKILL)
def wait():
    sys.stdin.buffer.read()
    end()
signal.signal(signal.SIGTERM, lambda *_: None)
threading.Thread(target=wait, daemon=True).start()
code = subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL)
print("the server ended with exit code", code, flush=True)
end()
"""


class VllmServer:
    """Starts a server; `wait` tells when it answers.

    Args:
        python: Interpreter of an environment with vLLM.
        arguments: What comes after `vllm serve`, but host and port.
        environment: Further environment variables.
        port: Where it listens; `None` for a free one.
        log: File for what it prints.

    Raises:
        ValueError: There is no such interpreter, or the port is taken.
    """

    def __init__(
        self,
        python: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        port: int | None,
        log: Path,
    ) -> None:
        path = shutil.which(os.path.expanduser(python))
        if path is None:
            raise ValueError(
                f"model.generator.python: expected the Python interpreter of an environment with vLLM, got {python!r}"
            )
        self.port = _free(port)
        self.log = log
        command = [path, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
        command += ["--host", HOST, "--port", str(self.port)]
        log.parent.mkdir(parents=True, exist_ok=True)
        # What another Python needs is not what this one does.
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _LEADER, *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**own, **environment},
            )

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"

    def wait(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until it answers.

        Args:
            ready: Whether it does.
            seconds: Longest wait.

        Raises:
            ValueError: It has ended, or does not answer in time; the message has the end of what it printed.
        """
        end = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None:
                raise ValueError(f"model.generator: expected a vLLM server, got one that has ended. {self.told()}")
            if time.monotonic() > end:
                raise ValueError(
                    f"model.generator: expected a vLLM server that answers within start_seconds = {seconds:g}, got "
                    f"none. {self.told()}"
                )
            time.sleep(PAUSE)

    def told(self) -> str:
        """Where it printed, and the first error there, or else the last line."""
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").split("\n")]
        said = (
            [line for line in lines if ERROR.search(line) and "WARNING" not in line]
            or [line for line in lines[-3:] if line]
            or ["nothing"]
        )
        return f"{self.log} says: {said[0][:600]}"

    def close(self) -> None:
        """End it and all that it started."""
        group = self.process.pid
        if self.process.poll() is None:
            os.killpg(group, signal.SIGTERM)
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(group, signal.SIGKILL)
                self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def lora_room(rank: int) -> int:
    """The smallest rank of adapters that vLLM makes room for and that holds this one."""
    return next((room for room in RANKS if room >= rank), rank)


def _free(port: int | None) -> int:
    """A port that nobody listens at.

    Raises:
        ValueError: Somebody does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port or 0))
        except OSError as error:
            raise ValueError(
                f"model.generator.port: expected a free port of {HOST} (null chooses one), got {port}, which is "
                f"taken: {error.strerror}"
            ) from None
        return int(probe.getsockname()[1])
