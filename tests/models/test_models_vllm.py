"""The vLLM generator against a small server that answers as vLLM does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import helpers
import ppo_helpers
import pytest
import torch
from vllm_stand_in import stand_in

from lit_vapo.models.generation import Sampling
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Lora, Pretrained, load_tokenizer
from lit_vapo.models.vllm_generator import VllmGenerator
from lit_vapo.rollout.rollout import assemble_rows
from lit_vapo.rollout.sampler import refuse_stale

PROMPTS = ["the film", "the plot was good and", "slow"]
SAMPLING = Sampling(6, 0.7, num_responses=3)


def adapted(model, rank=4, std=0.3, seed=1):
    """A policy whose adapters do something."""
    policy = Policy(Pretrained(model), Lora(rank, 16.0))
    move(policy, std, seed)
    return policy


def move(policy, std=0.3, seed=2):
    random = torch.Generator().manual_seed(seed)
    for name, parameter in policy.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std, generator=random)


class Session:
    """A generator that is open for a policy."""

    def __init__(self, server, policy, model, run, sampling=SAMPLING, version=5, longest=64, **options):
        self.policy, self.sampling, self.version = policy, sampling, version
        self.tokenizer = load_tokenizer(Pretrained(model))
        self.batch = ppo_helpers.prompt_batch(model, PROMPTS)
        self.generator = VllmGenerator(**{"address": server.address, "timeout_seconds": 20.0, **options})
        about = {"longest": longest, "folder": run, "version": version}
        self.generator.open(policy, self.tokenizer, sampling, **about)

    def draw(self, role="actor", stops=(), sampling=None, seed=0, batch=None):
        torch.manual_seed(seed)
        batch = batch or self.batch
        self.generator.sync(self.policy, role, self.version)
        with self.policy.acting_as(role) as lm:
            return self.generator(
                lm, self.tokenizer, batch.input_ids, batch.lengths, sampling or self.sampling, list(stops)
            )

    def learner(self, out, role="actor", sampling=None, stops=()):
        """Log-probabilities of the same tokens, by the policy itself."""
        rows = assemble_rows(self.batch, out)
        hidden = self.policy.hidden(role, rows.input_ids, rows.lengths).last
        shaping = (sampling or self.sampling).shaping(list(stops))
        mask = rows.response_mask
        found = self.policy.logprobs(role, hidden, rows.input_ids, rows.prompt_lengths, mask, shaping)
        return found.logprobs, mask


@pytest.fixture
def session(tiny_model_dir, tmp_path):
    with stand_in(tiny_model_dir) as server:
        made = Session(server, adapted(tiny_model_dir), tiny_model_dir, tmp_path)
        made.server = server
        yield made
        made.generator.close()


def rows_of(out):
    return [ids[:n] for ids, n in zip(out.response_ids.tolist(), out.response_lengths.tolist(), strict=True)]


@pytest.mark.parametrize("role", ["actor", "reference"])
def test_each_role_is_answered_by_its_own_weights(session, role):
    stops = list(range(40))
    out = session.draw(role, stops)
    learner, mask = session.learner(out, role, stops=stops)
    torch.testing.assert_close(out.logprobs[mask], learner[mask], rtol=1e-4, atol=1e-4)
    assert out.weights_version == (5 if role == "actor" else None)
    ends = [ids[-1] in stops for ids in rows_of(out)]
    assert out.stopped.tolist() == ends
    assert 0 < sum(ends) < 9
    other = "reference" if role == "actor" else "actor"
    assert (out.logprobs - session.learner(out, other, stops=stops)[0])[mask].abs().max() > 0.05


def test_equal_prompts_and_several_responses_differ(session):
    batch = ppo_helpers.prompt_batch(session.policy.base.path, ["the film"] * 4)
    rows = rows_of(session.draw(batch=batch))
    assert len(rows) == 12
    assert len({tuple(r) for r in rows}) == 12


def test_responses_to_a_prompt_come_in_order(session):
    out = rows_of(session.draw())
    server = session.server
    # Requests come in any order, and one that was hung up on comes again: the prompt says which is which.
    asked = {tuple(body["prompt"]): body for body in server.asked}
    lm = next(iter(server.adapters.values()))[1]
    prompts = zip(session.batch.input_ids, session.batch.lengths.tolist(), strict=True)
    for row, (ids, length) in enumerate(prompts):
        body = asked[tuple(ids[-length:].tolist())]
        expected = [server.choice(lm, body, j)["token_ids"] for j in range(3)]
        assert out[3 * row : 3 * row + 3] == expected


def test_the_same_seed_gives_the_same_responses_and_another_does_not(session):
    one, two, other = (rows_of(session.draw(seed=s)) for s in (1, 1, 2))
    assert one == two
    assert one != other


def test_a_request_says_all_that_shapes_the_distribution(session):
    sampling = Sampling(4, 0.5, num_responses=2, min_new_tokens=2)
    out = session.draw(sampling=sampling, stops=range(160))
    asked = session.server.asked[-1]
    expected = {
        "n": 2, "max_tokens": 4, "min_tokens": 2, "temperature": 0.5, "top_k": -1, "top_p": 1.0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True,
        "stop_token_ids": list(range(160)), "stop": [], "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip
    assert {name: asked[name] for name in expected} == expected
    lengths = [int(n) for n in session.batch.lengths]
    assert sorted(len(body["prompt"]) for body in session.server.asked[-3:]) == sorted(lengths)
    assert out.response_lengths.min() >= 3
    learner, mask = session.learner(out, sampling=sampling, stops=range(160))
    torch.testing.assert_close(out.logprobs[mask], learner[mask], rtol=1e-4, atol=1e-4)


def test_a_stop_string_ends_a_response(session):
    sampling = Sampling(8, 0.9, num_responses=8, stop_strings=["e", "a"])
    out = session.draw(sampling=sampling)
    assert session.server.asked[-1]["stop"] == ["e", "a"]
    for ids, stopped in zip(rows_of(out), out.stopped.tolist(), strict=True):
        text = session.tokenizer.decode(ids)
        assert stopped == ("e" in text or "a" in text)
    assert out.stopped.any()


def test_new_weights_come_under_a_new_name_and_old_ones_go(session, tmp_path):
    first = session.server.loaded[-1]
    assert first == str(tmp_path / "generator" / "v5")
    session.draw()
    assert len(session.server.loaded) == 1, "equal versions are not handed over twice"
    move(session.policy)
    session.version = 6
    out = session.draw()
    assert out.weights_version == 6
    learner, mask = session.learner(out)
    torch.testing.assert_close(out.logprobs[mask], learner[mask], rtol=1e-4, atol=1e-4)
    assert [name[-3:] for name in session.server.adapters] == ["-v6"]
    assert [path.name for path in (tmp_path / "generator").iterdir()] == ["v6"]
    session.generator.close()
    assert not session.server.adapters
    assert not list((tmp_path / "generator").iterdir())


def test_what_a_killed_run_left_is_removed(tiny_model_dir, tmp_path):
    left, other = tmp_path / "generator" / "v3", tmp_path / "elsewhere" / "v3"
    left.mkdir(parents=True)
    other.mkdir(parents=True)
    with stand_in(tiny_model_dir) as server:
        Session(server, adapted(tiny_model_dir), tiny_model_dir, tmp_path).generator.close()
        assert not left.exists()
        given = {"folder": str(other.parent)}
        Session(server, adapted(tiny_model_dir), tiny_model_dir, tmp_path, **given).generator.close()
        assert server.loaded[-1] == str(other.parent / "v5")
        assert other.exists(), "a folder that is chosen may be another run's, too"


def test_whole_weights_take_the_place_of_the_base_and_the_reference_stays_here(tiny_model_dir, tmp_path):
    policy = Policy(Pretrained(tiny_model_dir), None)
    with stand_in(tiny_model_dir) as server:
        session = Session(server, policy, tiny_model_dir, tmp_path)
        for parameter in policy.lm.parameters():
            parameter.data.mul_(1.2)
        session.version = 8
        out = session.draw()
        assert out.weights_version == 8
        learner, mask = session.learner(out)
        torch.testing.assert_close(out.logprobs[mask], learner[mask], rtol=1e-4, atol=1e-4)
        asked = len(server.asked)
        reference = session.draw("reference")
        assert reference.logprobs is None
        assert len(server.asked) == asked
        server.version = server.version[:-1] + "7"
        with pytest.raises(ValueError, match=r"of the weights of version 8 .*, got those of version 7"):
            refuse_stale(session.draw().weights_version, 8)
        server.version = "somebody else's"
        with pytest.raises(ValueError, match=r"expected weights policy-\w+-vN of this run .*, got .somebody else's."):
            session.draw()


def test_a_policy_that_starts_elsewhere_has_its_reference_here(tiny_model_dir, tmp_path):
    tokenizer = load_tokenizer(Pretrained(tiny_model_dir))
    start = helpers.tiny_model(tmp_path / "start", tokenizer, seed=3)
    policy = Policy(Pretrained(tiny_model_dir), Lora(4, 16.0), start=start)
    with stand_in(start) as server:
        session = Session(server, policy, tiny_model_dir, tmp_path)
        assert session.draw("reference").logprobs is None
        assert session.draw().logprobs is not None


# What is refused at the start.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"max_model_len": 63}, r"room for 64 tokens \(.*max_new_tokens\), got one with --max-model-len 63"),
     ({"shift": 1}, r"expected a server of '.*', with its vocabulary, got one of '.*' with another: .The film"),
     ({"max_lora_rank": 2}, r"adapter of rank 4 \(model.lora.rank\).*LoRA rank 4 is greater than max_lora_rank 2"),
     ({"max_lora_rank": None}, r"started with --enable-lora, .*got http.*/v1/load_lora_adapter: .*got 404"),
     ({"raw": True}, r"--logprobs-mode processed_logprobs\), got those before it: at temperature 0.6")],
    ids=str,
)  # fmt: skip
def test_a_server_that_does_not_fit_is_refused(tiny_model_dir, tmp_path, wrong, message):
    with stand_in(tiny_model_dir, **wrong) as server, pytest.raises(ValueError, match=f"model.generator: .*{message}"):
        Session(server, adapted(tiny_model_dir), tiny_model_dir, tmp_path)
    assert not list((tmp_path / "generator").glob("v*"))


def test_a_server_of_another_base_is_refused(tiny_model_dir, tmp_path):
    tokenizer = load_tokenizer(Pretrained(tiny_model_dir))
    other = helpers.tiny_model(tmp_path / "other", tokenizer, seed=7)
    message = rf"expected a server of '{tiny_model_dir}', got one with other weights: .* above max_kl = 0.1"
    with stand_in(other) as server, pytest.raises(ValueError, match=message):
        Session(server, adapted(tiny_model_dir), tiny_model_dir, tmp_path)


def test_a_server_of_another_precision_is_told_of_with_the_kl(tiny_model_dir, tmp_path):
    with stand_in(tiny_model_dir) as server:
        for parameter in server.base.parameters():
            parameter.data.add_(0.05 * parameter.data.std() * torch.randn_like(parameter))
        server.base.save_pretrained(tmp_path / "rounded")
        server.path = str(tmp_path / "rounded")
        with pytest.warns(UserWarning, match=r"other than the learner's \(float32\): KL.* of a probe is 0.0"):
            Session(server, adapted(tiny_model_dir), tiny_model_dir, tmp_path)


def test_a_server_without_a_door_for_weights_is_refused_to_full_fine_tuning(tiny_model_dir, tmp_path):
    policy = Policy(Pretrained(tiny_model_dir), None)
    message = r"expected a server that takes whole weights from .*VLLM_SERVER_DEV_MODE=1, .*collective_rpc: .*got 404"
    with stand_in(tiny_model_dir, dev=False) as server, pytest.raises(ValueError, match=message):
        Session(server, policy, tiny_model_dir, tmp_path)


def test_an_address_at_which_nobody_answers_is_refused(tiny_model_dir, tmp_path):
    with stand_in(tiny_model_dir) as server:
        pass
    message = rf"model.generator.address: expected a vLLM server at {server.address} within start_seconds = 0.1"
    with pytest.raises(ValueError, match=message):
        Session(server, adapted(tiny_model_dir), tiny_model_dir, tmp_path, start_seconds=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "expected the address of a vLLM server, or python .* to start one, got neither"),
     ({"address": "http://here:1", "python": "python"}, "to start one, got both"),
     ({"address": "here:1"}, r"model.generator.address: expected http\(s\)://host"),
     ({"address": "http://here:1", "port": 3}, "expected options, environment and port for a server to start"),
     ({"address": "http://here:1", "timeout_seconds": 0}, "model.generator.timeout_seconds: expected a number above 0"),
     ({"address": "http://here:1", "max_kl": -1.0}, "model.generator.max_kl: expected a number above 0, got -1")],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VllmGenerator(**options)


# What goes wrong on the way.


def test_a_request_that_is_hung_up_on_is_tried_once_more(session):
    expected = rows_of(session.draw())
    # One: of several that are hung up on at once, one may be so a second time.
    session.server.drops = 1
    assert rows_of(session.draw()) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"drops": 100}, r"expected responses, got none: http.*/v1/completions: expected an answer, got none .*--resume"),
     ({"dead": True}, r"expected responses, got none: .*--resume"),
     ({"slow": 30}, r"expected responses, got none: .*expected an answer within 1 seconds, got none.*--resume"),
     ({"finish": "abort"}, r"expected whole responses, got one with 'abort'"),
     ({"cut": 2}, r"responses of up to 6 tokens, got one cut off after 2: .*--max-model-len"),
     ({"stale_name": True}, r"expected responses of .*-v6.*, got those of .*-v5"),
     ({"beyond": True}, r"expected tokens of the model's 3, got \d+: .*another vocabulary")],
    ids=str,
)  # fmt: skip
def test_a_server_that_fails_ends_the_run_with_a_reason(session, monkeypatch, wrong, message):
    if "beyond" in wrong:
        session.generator._vocabulary = 3
    monkeypatch.setattr("lit_vapo.models.vllm_generator.RECOVERY", 0.2)
    if "slow" in wrong:
        session.generator._client.timeout = session.generator.timeout_seconds = 1.0
    move(session.policy)
    if not wrong.get("dead"):
        session.version = 6
    vars(session.server).update(wrong)
    with pytest.raises(ValueError, match=message):
        session.draw()
    assert session.generator._client is None, "nothing stays open"


def test_a_generator_that_was_not_opened_says_so(session):
    session.generator.close()
    with pytest.raises(ValueError, match=r"expected open\(\) before the first prompt"):
        session.draw()


# A server to start, and several processes.


@pytest.mark.parametrize("rank", [4, 12, None])
def test_a_server_that_is_started_gets_what_the_policy_needs(tiny_model_dir, tmp_path, monkeypatch, rank):
    policy = Policy(Pretrained(tiny_model_dir), Lora(rank, 16.0) if rank else None)
    started, closed = [], []

    with stand_in(tiny_model_dir) as server:

        class Fake:
            address = server.address

            def __init__(self, *given):
                started.append(given)

            def wait(self, ready, seconds):
                assert ready()

            def close(self):
                closed.append(1)

        monkeypatch.setattr("lit_vapo.models.vllm_generator.VllmServer", Fake)
        given = {"python": "py", "options": ["--seed", "3"], "environment": {"A": "b"}, "port": 7, "address": None}
        session = Session(server, policy, tiny_model_dir, tmp_path, **given)
        assert session.draw().weights_version == 5
        session.generator.close()
    python, words, environment, port, log = started[0]
    assert (python, port, log) == ("py", 7, tmp_path / "generator" / "server.log")
    common = ["--max-model-len", "64", "--logprobs-mode", "processed_logprobs", "--dtype", "float32"]
    adapters = ["--enable-lora", "--max-lora-rank", "8" if rank == 4 else "16"] if rank else []
    # What the user says comes last, and so it counts.
    assert words == [tiny_model_dir, *common, *adapters, "--seed", "3"]
    door = "VLLM_ALLOW_RUNTIME_LORA_UPDATING" if rank else "VLLM_SERVER_DEV_MODE"
    assert environment == {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", door: "1", "A": "b"}
    assert closed


WORKER = """
import json, sys, pathlib
import torch
from torch import distributed
import ppo_helpers
from test_models_vllm import SAMPLING, Session, adapted

number, folder, model, address = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
session = Session(type("Server", (), {"address": address}), adapted(model), model, folder)
batch = ppo_helpers.prompt_batch(model, ["the film"] if number else ["slow"])
out = session.draw(batch=batch, seed=number)
found = {"version": out.weights_version, "rows": out.response_ids.tolist()}
session.version = 6
found["next"] = session.draw(batch=batch).weights_version
if number == 1:
    session.generator._client.address = "http://127.0.0.1:9"
try:
    session.draw(batch=batch)
except ValueError as error:
    found["failed"] = str(error)
(folder / f"{number}.json").write_text(json.dumps(found))
distributed.destroy_process_group()
"""


def test_processes_share_the_weights_and_end_together(tiny_model_dir, tmp_path):
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [here, here.parent, here.parents[1]]))}
    code = WORKER.replace("import ppo_helpers\n", RECOVERY_SOON)
    with stand_in(tiny_model_dir) as server:
        command = [sys.executable, "-W", "ignore", "-c", code]
        rest = [str(tmp_path), tiny_model_dir, server.address]
        both = [subprocess.Popen([*command, str(n), *rest], env=environment) for n in (0, 1)]
        assert [process.wait(300) for process in both] == [0, 0]
    found = [json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1)]
    assert [(said["version"], said["next"]) for said in found] == [(5, 6), (5, 6)]
    assert found[0]["rows"] != found[1]["rows"]
    assert [path.rpartition("/")[2] for path in server.loaded] == ["v5", "v6"], "one process hands weights over"
    assert re.match(r"process 1: model.generator: expected responses, got none: http://127.0.0.1:9", found[0]["failed"])
    assert found[1]["failed"].startswith("model.generator: expected responses, got none")


RECOVERY_SOON = """import ppo_helpers
import lit_vapo.models.vllm_generator as generator
generator.RECOVERY = 0.1
"""
