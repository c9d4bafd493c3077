"""What processes tell each other: none goes on where one has failed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_vapo.models.processes import of_all, rank, rows_of_all, together

WORKER = """
import json, sys
import torch
from torch import distributed
from lit_vapo.models.processes import of_all, rank, rows_of_all, together

number, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method="file://" + store, rank=number, world_size=2)
found = {"rank": rank(), "of_all": of_all(f"process {number}"), "rows": rows_of_all(torch.full((1, 2), number))}
found["rows"] = found["rows"].tolist()
with together():
    pass
try:
    with together():
        if number == 1:
            raise ValueError("no server")
    found["failed"] = "nothing"
except ValueError as error:
    found["failed"] = str(error)
open(f"{out}/{number}.json", "w").write(json.dumps(found))
distributed.destroy_process_group()
"""


def test_one_process_is_all_there_are():
    assert rank() == 0
    assert of_all("a") == ["a"]
    assert torch.equal(rows_of_all(torch.ones(2, 3)), torch.ones(2, 3))
    with pytest.raises(OSError, match="no room"), together():
        raise OSError("no room")


def test_an_error_of_one_process_is_one_of_all(tmp_path):
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    started = [subprocess.Popen([*command, str(n), str(tmp_path / "store"), str(tmp_path)], cwd=root) for n in (0, 1)]
    assert [process.wait(240) for process in started] == [0, 0]
    found = [json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1)]
    for number, said in enumerate(found):
        assert said["rank"] == number
        assert said["of_all"] == ["process 0", "process 1"]
        assert said["rows"] == [[0, 0], [1, 1]]
    assert [said["failed"] for said in found] == ["process 1: no server", "no server"]
