"""Servers in processes of their own: they start, and nothing of them stays, however they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_vapo.models.vllm_server import VllmServer, lora_room

# Like vLLM, it has a worker that outlives it unless somebody ends both.
PROGRAM = """
import json, os, subprocess, sys, time
folder = sys.argv[1]
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
said = {"worker": worker.pid, "arguments": sys.argv[2:]} | {x: os.environ.get(x) for x in ("VLLM_X", "PYTHONPATH")}
open(folder + "/said.tmp", "w").write(json.dumps(said))
os.rename(folder + "/said.tmp", folder + "/said.json")
if "die" in sys.argv:
    print("WARNING: this could end with OSError: too many files", flush=True)
    raise RuntimeError("no room for the model")
time.sleep(600)
"""


@pytest.fixture
def python(tmp_path):
    """Something that stands in for the interpreter of vLLM's environment."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "{tmp_path}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def said(folder, seconds=30):
    end = time.monotonic() + seconds
    while not (folder / "said.json").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return json.loads((folder / "said.json").read_text())


def gone(pid, seconds=20):
    """Whether a process ends within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_server_gets_its_words_and_ends_with_its_worker(python, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    server = VllmServer(python, ["model", "--dtype", "float32"], {"VLLM_X": "1"}, None, tmp_path / "log" / "server.log")
    told = said(tmp_path)
    expected = ["-m", "vllm.entrypoints.cli.main", "serve", "model", "--dtype", "float32", "--host", "127.0.0.1"]
    assert told["arguments"] == [*expected, "--port", server.address.rpartition(":")[2]]
    assert told["VLLM_X"] == "1"
    assert told["PYTHONPATH"] is None, "what our Python reads is not for the server's"
    server.close()
    server.close()
    assert gone(told["worker"])


def test_a_server_that_dies_takes_its_worker_along_and_says_why(python, tmp_path):
    server = VllmServer(python, ["die"], {}, None, tmp_path / "server.log")
    message = r"expected a vLLM server, got one that has ended. .*server.log says: RuntimeError: no room for the model"
    with pytest.raises(ValueError, match=message):
        server.wait(lambda: False, 60)
    assert gone(said(tmp_path)["worker"])
    server.close()


def test_a_server_that_does_not_answer_in_time_is_named(python, tmp_path):
    server = VllmServer(python, [], {}, None, tmp_path / "server.log")
    message = r"answers within start_seconds = 0.1, got none. .*server.log says: nothing"
    with pytest.raises(ValueError, match=message):
        server.wait(lambda: False, 0.1)
    said(tmp_path)
    server.close()


def test_a_server_ends_where_we_are_killed(python, tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from lit_vapo.models.vllm_server import VllmServer\n"
        "server = VllmServer(sys.argv[1], [], {}, None, pathlib.Path(sys.argv[2]))\n"
        "time.sleep(600)\n"
    )
    root = str(Path(__file__).parents[2])
    ours = subprocess.Popen([sys.executable, "-c", code, python, str(tmp_path / "server.log")], cwd=root)
    worker = said(tmp_path, 120)["worker"]
    os.kill(ours.pid, signal.SIGKILL)
    ours.wait()
    assert gone(worker)


def test_a_port_that_is_taken_is_refused(python, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        message = rf"model.generator.port: expected a free port of 127.0.0.1 .*, got {port}, which is taken"
        with pytest.raises(ValueError, match=message):
            VllmServer(python, [], {}, port, tmp_path / "server.log")


def test_an_interpreter_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"model.generator.python: expected the Python interpreter .*, got '/no/python'"
    ):
        VllmServer("/no/python", [], {}, None, tmp_path / "server.log")


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (16, 16), (17, 32), (512, 512), (600, 600)])
def test_there_is_room_for_a_rank(rank, room):
    assert lora_room(rank) == room
