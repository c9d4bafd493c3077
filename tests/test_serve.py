"""`lit-vapo reward serve`: a service in a process of its own, asked as PPO asks it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import ppo_helpers
import public_helpers as public
import pytest
import torch

from lit_vapo.cli import main
from lit_vapo.commands import serve as serving
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards import EnsembleReward, PretrainedRewards, RemoteReward
from lit_vapo.rollout import Encoders, text_responses

ROOT = Path(__file__).parents[1]


@contextmanager
def served(*words, **env):
    """A service in a process; its URL, the process, and what it prints."""
    command = [sys.executable, "-m", "lit_vapo", "reward", "serve", "--port=0", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        found = re.match(r"listening on (http://127.0.0.1:\d+) \((\d+) members\); Ctrl-C ends it", line)
        assert found, line + process.stderr.read()
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


def request(url, method="POST", body=b"", **headers):
    """Status and JSON of an answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request(method, "/", body, headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def rows(*texts, **more):
    return json.dumps({"rows": [{"prompt": "the film", "response": text} for text in texts], **more}).encode()


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """An ensemble of three members."""
    path = tmp_path_factory.mktemp("served") / "ensemble"
    return ppo_helpers.ensemble(path, tiny_model_dir, 3, pooling="mean")


@pytest.fixture(scope="module")
def there(folder):
    """The ensemble as a service that asks for a token."""
    with served(f"--ensemble={folder}", "--token_env=SERVED_TOKEN", SERVED_TOKEN="open-sesame") as (url, _):
        yield url


def test_an_ensemble_scores_over_there_as_it_does_here(folder, there, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "open-sesame")
    here = EnsembleReward(folder)
    here.prepare(None)
    remote = RemoteReward(there, num_members=3, token_env="MY_TOKEN")
    remote.prepare(None)
    prompts = ["the film", public.MESSAGES[0], "Review: a quiet"]
    asked = public.responses(prompts, [" was good", "bad", " family"], [True, True, False])
    torch.testing.assert_close(remote.score(asked).members, here.score(asked).members, rtol=1e-6, atol=1e-6)


def test_ppo_learns_from_there_as_from_here(folder, there, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "open-sesame")
    remote = RemoteReward(there, num_members=3, token_env="MY_TOKEN")
    here = EnsembleReward(folder)
    here.prepare(None)
    seen = []
    score = RemoteReward.score

    def both(self, responses):
        # Of what the policy wrote the texts travel, not the tokens.
        texts = text_responses(responses.prompts, responses.texts, responses.finished.tolist(), Encoders())
        seen.append((score(self, responses), here.score(texts)))
        return seen[-1][0]

    monkeypatch.setattr(RemoteReward, "score", both)
    module = ppo_helpers.ppo_module(tiny_model_dir, remote, objective=VarianceAware(), num_reference=8)
    ppo_helpers.fit_ppo(module, ppo_helpers.prompt_data(tiny_model_dir, tmp_path, 8), tmp_path)
    assert len(seen) == 2
    for remotely, locally in seen:
        torch.testing.assert_close(remotely.members, locally.members, rtol=1e-5, atol=1e-5)
        # Measured by each on responses of its own reference: the ensemble's were those of its calibration.
        assert float(remotely.reference_variance) > 0


def test_who_has_no_token_is_told(there):
    assert request(there, body=rows("good")) == (401, {"error": "expected the bearer token of this service"})
    status, _ = request(there, body=rows("good"), Authorization="Bearer open-sesam")
    assert status == 401
    assert request(there, "GET") == (200, {"num_members": 3, "calibrated": True})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", r"Invalid JSON"),
        (b"[]", r"expected an object|valid dictionary"),
        (rows(), r"rows: List should have at least 1 item"),
        (rows("a", format_version=2), r"format_version: expected 1, got 2"),
        (rows("a", more=1), r"more: expected no such key"),
        (b'{"rows": [{"prompt": "a"}]}', r"rows.0.response: expected this key, got none"),
        (b'{"rows": [{"prompt": "a", "response": 3}]}', r"rows.0.response: expected a valid string, got 3"),
        (b'{"rows": [{"prompt": [], "response": "a"}]}', r"rows.0.prompt"),
        (
            b'{"rows": [{"prompt": [{"role": "user", "content": "a"}], "response": "b", "tools": [{}]}]}',
            r"reward: expected a chat template that reads tools",
        ),
    ],
)
def test_a_bad_request_is_answered_with_a_sentence(there, body, message):
    status, answer = request(there, body=body, Authorization="Bearer open-sesame")
    assert (status, list(answer)) == (400, ["error"])
    assert re.search(message, answer["error"]), answer


def test_bodies_have_a_size(there):
    connection = http.client.HTTPConnection(urlsplit(there).netloc, timeout=20)
    for length, status in ((str(2**40), 413), ("-1", 411), ("many", 411)):
        connection.putrequest("POST", "/")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == status
        connection.close()


def test_it_goes_on_after_all_this(there):
    status, answer = request(there, body=rows("good", "bad"), Authorization="Bearer open-sesame")
    assert status == 200
    assert [len(x) for x in answer["rewards"]] == [3, 3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_told(tmp_path, number):
    # Public reward models, which nobody has calibrated, and no token.
    path = public.classifier(tmp_path / "m")
    PretrainedRewards([Pretrained(path)]).save_pretrained(tmp_path / "saved")
    with served(f"--reward={tmp_path / 'saved'}") as (url, process):
        status, answer = request(url, body=rows("good"))
        assert status == 200
        assert isinstance(answer["rewards"][0], float)
        process.send_signal(number)
        assert process.wait(20) == 0
        assert "WARNING: members are not centred and scaled" in process.stderr.read()


def test_a_fault_of_its_own_is_told_to_its_owner(folder, monkeypatch, capsys):
    class Broken(EnsembleReward):
        def score(self, responses):
            raise ZeroDivisionError("inside")

    source = Broken(folder)
    server = serving._Server(("127.0.0.1", 0), source, None)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert request(url, body=rows("a")) == (500, {"error": "scoring failed; the service's own output says why"})
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert "ZeroDivisionError: inside" in capsys.readouterr().err


def test_what_cannot_be_served_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--reward: expected the folder of an ensemble or .*, got none"):
        main(["reward", "serve"])
    with pytest.raises(ValueError, match=r"--reward: expected the folder .*, got one beside --ensemble"):
        serving.serve(folder, folder)
    with pytest.raises(ValueError, match=r"reward: expected a folder with ensemble.json"):
        main(["reward", "serve", f"--ensemble={tmp_path}"])
    with pytest.raises(ValueError, match=r"--port: expected 0 … 65535, got 70000"):
        main(["reward", "serve", f"--ensemble={folder}", "--port=70000"])
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with pytest.raises(
        ValueError, match=r"--token_env: expected the name of an environment variable with a token, got 'NO"
    ):
        main(["reward", "serve", f"--ensemble={folder}", "--token_env=NO_TOKEN"])
