"""Rewards from an HTTP service: what travels, what is tried again, and what is said when it goes wrong."""

import json
import time

import ppo_helpers
import public_helpers as public
import pytest
import torch
from services import says, service

from lit_vapo import http_client
from lit_vapo.objectives.variance_aware import VarianceAware
from lit_vapo.rewards import RemoteReward
from lit_vapo.rewards.protocol import Answer, Request
from lit_vapo.types import Prompt

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def lengths(number, body):
    """A service whose reward is the length of the response."""
    return says(body={"rewards": [float(len(row["response"])) for row in body["rows"]]})


def triple(number, body):
    """Three members."""
    return says(body={"rewards": [[len(r["response"]) * k + k for k in (1.0, 2.0, 4.0)] for r in body["rows"]]})


def remote(url, **kwargs):
    made = RemoteReward(url, **{"timeout": 5.0, "pause": 0.01, "retries": 2, **kwargs})
    made.prepare(None)
    return made


def ask(url, **kwargs):
    return remote(url, **kwargs).score(public.responses())


# What travels.


def test_texts_go_out_and_numbers_come_in():
    prompts = ["the film", Prompt([{"role": "user", "content": "Hm\ud800"}], [TOOL]), public.MESSAGES[0]]
    with service(lengths) as there:
        estimate = remote(there.url).score(public.responses(prompts, ["good", " bad é", ""], [True, False, True]))
    assert estimate.mean.tolist() == [4.0, 6.0, 0.0]
    assert estimate.members.shape == (3, 1)
    assert estimate.reference_variance is None
    assert there.bodies == [
        {
            "format_version": 1,
            "rows": [
                {"prompt": "the film", "response": "good", "finished": True, "tools": None},
                {
                    "prompt": [{"role": "user", "content": "Hm\ud800"}],
                    "response": " bad é",
                    "finished": False,
                    "tools": [TOOL],
                },
                {"prompt": public.MESSAGES[0].content, "response": "", "finished": True, "tools": None},
            ],
        }
    ]
    assert there.headers[0]["Content-Type"] == "application/json"


def test_what_is_sent_is_what_the_schema_says():
    with service(lengths) as there:
        ask(there.url)
    assert Request.model_validate_json(json.dumps(there.bodies[0])).rows[0].asked() == public.MESSAGES[0]
    assert Answer.model_validate_json('{"rewards": [1, [2, 3]], "seconds": 4}').rewards == [1.0, [2.0, 3.0]]


def test_members_come_as_they_are_and_their_variance_is_measured():
    with service(triple) as there:
        scorer = remote(there.url, num_members=3)
        assert not scorer.calibrated
        raw = scorer.score(public.responses())
        size = torch.tensor([float(len(text)) for text in public.TEXTS])
        torch.testing.assert_close(raw.members, torch.stack([size * k + k for k in (1, 2, 4)], dim=1))
        assert raw.reference_variance is None
        scorer.calibrate([public.responses(), public.responses()])
        estimate = scorer.score(public.responses())
        torch.testing.assert_close(estimate.members, raw.members)
        torch.testing.assert_close(estimate.reference_variance, raw.members.var(1).mean())
        own = remote(there.url, num_members=3, normalise=True)
        own.calibrate([public.responses()])
        expected = (raw.members - raw.members.mean(0)) / raw.members.std(0)
        torch.testing.assert_close(own.score(public.responses()).members, expected)
    assert scorer.calibrated
    assert (scorer.unit, own.unit) == ("units of the source", "standard deviations of the reference's rewards")
    assert scorer.own_state() == set(scorer.state_dict())


def test_one_reward_needs_no_calibration():
    assert remote("http://there").calibrated
    assert not remote("http://there", normalise=True).calibrated


def test_a_token_comes_from_the_environment_and_is_never_told(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret-word")

    def echo(number, body):
        return says(403, b"no entry for secret-word")

    with service(lengths) as there:
        ask(there.url, token_env="MY_TOKEN")
        ask(there.url)
        assert there.headers[0]["Authorization"] == "Bearer secret-word"
        assert "Authorization" not in there.headers[1]
    with service(echo) as there, pytest.raises(ValueError, match=r"got 403 Forbidden: no entry for …") as caught:
        ask(there.url, token_env="MY_TOKEN")
    assert "secret-word" not in str(caught.value)
    assert "secret-word" not in str(vars(remote(there.url, token_env="MY_TOKEN")))


@pytest.mark.parametrize("value", [None, " ", "a\nb"])
def test_a_token_that_is_none_is_refused_before_anything_runs(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("MY_TOKEN", raising=False)
    else:
        monkeypatch.setenv("MY_TOKEN", value)
    with pytest.raises(
        ValueError, match=r"reward.token_env: expected the name of an environment variable with a token"
    ):
        remote("http://there", token_env="MY_TOKEN").check()


# What is tried again.


@pytest.mark.parametrize("first", [says(500, b"oops"), says(503), None])
def test_what_may_pass_is_tried_again(first):
    with service(lambda n, body: first if n < 2 else lengths(n, body)) as there:
        assert ask(there.url).mean.tolist() == [float(len(text)) for text in public.TEXTS]
        assert len(there.bodies) == 3


def test_pauses_grow_and_end():
    slept = []
    with service(lambda n, body: says(500)) as there:
        with pytest.raises(ValueError, match=r"expected status 200, got 500 .*, 8 times in all"):
            http_client.post(there.url, b"{}", None, 5.0, 7, 1.0, 100, slept.append)
        assert len(there.bodies) == 8
    assert slept == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_what_will_not_pass_is_not():
    with service(lambda n, body: says(404, b"nothing here")) as there:
        with pytest.raises(ValueError, match=rf"{there.url}: expected status 200, got 404 Not Found: nothing here$"):
            ask(there.url)
        assert len(there.bodies) == 1


# What is said when it goes wrong.


def test_a_service_that_is_down_is_named():
    with service(lengths) as there:
        url = there.url
    with pytest.raises(ValueError, match=rf"{url}: expected an answer, got none \(.*refused.*\), 3 times in all"):
        ask(url)


@pytest.mark.parametrize("late", ["before", "within"])
def test_a_slow_service_is_not_waited_for(late):
    def slow(number, body):
        if late == "before":
            time.sleep(3)
            return lengths(number, body)
        # A little now and then, none of it later than the time-out.
        return says(200, b" " * 64 * 100, **{"X-Slow": "0.1"})

    started = time.monotonic()
    message = r"127.0.0.1:\d+: expected an answer within 0.3 seconds, got none, 2 times in all"
    with service(slow) as there, pytest.raises(ValueError, match=message):
        ask(there.url, timeout=0.3, retries=1)
    assert time.monotonic() - started < 3


def test_a_service_that_fails_is_named_with_what_it_says():
    message = r": expected status 200, got 500 .*: out of memory x+, 3 times"
    failing = service(lambda n, body: says(500, b"out of memory\n" + b"x" * 9000))
    with failing as there, pytest.raises(ValueError, match=message) as caught:
        ask(there.url)
    assert len(str(caught.value)) < 500


def test_a_redirect_is_not_followed(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret-word")
    with service(lengths) as other, service(lambda n, b: says(302, b"", Location=other.url)) as there:
        with pytest.raises(ValueError, match=r": expected status 200, got 302"):
            ask(there.url, token_env="MY_TOKEN")
        assert other.bodies == []


def test_an_answer_has_an_end(monkeypatch):
    monkeypatch.setattr("lit_vapo.rewards.remote.LARGEST_BODY", 1000)
    message = r": expected an answer of at most 1000 bytes, got more$"
    with service(lambda n, body: says(200, b" " * 200_000)) as there, pytest.raises(ValueError, match=message):
        ask(there.url)


NAN = b'{"rewards": [1.0, NaN, 2.0]}'


@pytest.mark.parametrize(
    ("members", "body", "message"),
    [
        (1, b"<html>Welcome</html>", r"expected JSON, \{\"rewards\": \[…\]\}, got '<html>Welcome</html>'"),
        (1, b"", r"expected JSON, .*, got ''"),
        (
            1,
            {"scores": [1.0, 2.0, 3.0]},
            r"expected \{\"rewards\": \[…\]\}, got something else \(rewards: ",
        ),
        (1, [1.0, 2.0, 3.0], r"expected \{\"rewards\": \[…\]\}, got something else"),
        (1, {"rewards": [1.0, 2.0]}, r"expected rewards of 3 rows, got 2"),
        (1, NAN, r"row 1: expected finite rewards, got nan"),
        (1, {"rewards": [1.0, None, 2.0]}, r"row 1: expected a number, got None"),
        (1, {"rewards": [1.0, 2.0, "3"]}, r"row 2: expected a number, got '3'"),
        (1, {"rewards": [1.0, 2.0, True]}, r"row 2: expected a number, got True"),
        (1, {"rewards": [1.0, 2.0, 1e400]}, r"row 2: expected finite rewards, got inf"),
        (1, {"rewards": [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]}, r"row 0: expected a number, got \[1.0, 2.0\]"),
        (3, {"rewards": [[1.0, 2.0, 3.0], [1.0, 2.0], [1.0, 2.0, 3.0]]}, r"row 1: expected a list of 3 numbers, got"),
        (3, {"rewards": [1.0, 2.0, 3.0]}, r"row 0: expected a list of 3 numbers, got 1.0"),
        (3, {"rewards": [[1.0, 2.0, 3.0], [1.0, 2.0, "x"], []]}, r"row 1: expected a list of 3 numbers, got .*'x'"),
    ],
)
def test_an_answer_that_is_none_is_named_with_its_row(members, body, message):
    raw = json.dumps(body).replace("Infinity", "1e400").encode() if not isinstance(body, bytes) else body
    with service(lambda n, request: says(200, raw)) as there:
        with pytest.raises(ValueError, match=rf"^{there.url}: {message}"):
            ask(there.url, num_members=members)
        assert len(there.bodies) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "file:///etc/passwd"}, r"reward.url: expected http\(s\)://host\[:port\]/…, got 'file:///etc/passwd'"),
        ({"url": "localhost:8000"}, r"reward.url: expected http"),
        ({"url": "http://"}, r"reward.url: expected http"),
        ({"url": "http://there:99999"}, r"reward.url: expected http"),
        ({"url": "http://me:secret@there"}, r"reward.url: expected no password in it, got one; name a variable"),
        ({"num_members": 0}, r"reward.num_members: expected at least 1, got 0"),
        ({"retries": -1}, r"reward.retries: expected a number of 0 or more, got -1"),
        ({"timeout": 0.0}, r"reward.timeout: expected seconds above 0, got 0.0"),
        ({"pause": float("inf")}, r"reward.pause: expected seconds above 0, got inf"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        RemoteReward(**{"url": "http://there", **options})
    assert "secret" not in str(caught.value)


# PPO.


def test_ppo_learns_from_a_service(tiny_model_dir, tmp_path):
    data = ppo_helpers.prompt_data(tiny_model_dir, tmp_path, 8)
    with service(triple) as there:
        module = ppo_helpers.ppo_module(
            tiny_model_dir, remote(there.url, num_members=3), objective=VarianceAware(), num_reference=8
        )
        rows = ppo_helpers.fit_ppo(module, data, tmp_path)
        # Two batches of references, then one POST an iteration.
        assert [len(body["rows"]) for body in there.bodies] == [4, 4, 4, 4]
    assert rows[-1]["train/ensemble_sigma"] > 0
    assert module.kept_keys() >= {f"reward.{name}" for name in module.reward.own_state()}
