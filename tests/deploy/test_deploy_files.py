"""Files for containers, clusters and clouds: what their own validators say, and what only we know of them.

`make validate` installs the validators; without them, the tests that need one are skipped.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_vapo.cli import main

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SHELL = [*DEPLOY.glob("*.slurm"), *DEPLOY.glob("*.sh"), *(ROOT / "scripts").glob("*.sh")]
SECRETS = ("WANDB_API_KEY", "HF_TOKEN")


def validator(name):
    """A command of the environment that `make validate` makes, or of the path."""
    places = os.pathsep.join([str(Path(sys.prefix) / "validators" / "bin"), os.environ["PATH"]])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"{name} is not installed; make validate")
    return found


def validated(*words):
    done = subprocess.run([*map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


# What validators say.


def test_hadolint_finds_nothing():
    validated(validator("hadolint"), "Dockerfile")


def test_shellcheck_finds_nothing():
    validated(validator("shellcheck"), *SHELL)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_bash_can_read_it(path):
    validated("bash", "-n", path)


def test_the_compose_file_is_one():
    validated(validator("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_the_kubernetes_file_is_one():
    validated(validator("kubernetes-validate"), "--strict", "deploy/kubernetes.yaml")


def test_skypilot_takes_its_file():
    python = Path(validator("sky")).with_name("python")
    code = """
import sky, yaml
config = yaml.safe_load(open("deploy/skypilot.yaml"))
task = sky.Task.from_yaml_config(config, env_overrides=[("BUCKET", "mine"), ("RUN", "ppo fit")],
                                 secrets_overrides=[("WANDB_API_KEY", "k"), ("HF_TOKEN", "t")])
assert all(r.use_spot for r in task.resources) and len(task.resources) == 4
assert list(task.storage_mounts) == ["/lit-vapo-runs"] and task.storage_mounts["/lit-vapo-runs"].name == "mine"
"""
    validated(python, "-c", code)


# What only we know.


def loaded(path):
    return list(yaml.safe_load_all((ROOT / path).read_text()))


def dicts(value):
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from dicts(inner)


@pytest.mark.parametrize("path", ["compose.yaml", "deploy/kubernetes.yaml", "deploy/skypilot.yaml"])
def test_keys_come_from_outside(path):
    text = (ROOT / path).read_text()
    assert not re.search(r"hf_[A-Za-z]{8}|[0-9a-f]{40}|sk-[A-Za-z0-9]{8}", text)
    for part in dicts(loaded(path)):
        for name in SECRETS:
            # No value: it is passed on, or asked for.
            assert part.get(name) is None
            if part.get("name") == name:
                assert set(part) == {"name", "valueFrom"}
    assert all(name in text for name in SECRETS)


def words_of(path):
    """The words for lit-vapo that a file has."""
    if path == "compose.yaml":
        (file,) = loaded(path)
        return [re.sub(r"\$\{\w+:[-?]([^}]*)\}", "data.yaml", word) for word in file["services"]["train"]["command"]]
    job = next(part for part in loaded(path) if part["kind"] == "Job")
    return job["spec"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize("path", ["compose.yaml", "deploy/kubernetes.yaml"])
def test_the_words_of_a_file_are_options(path, tmp_path, monkeypatch, capsys):
    words = words_of(path)
    for word in words:
        if word.startswith("--config="):
            assert (ROOT / word.removeprefix("--config=")).is_file(), word
    assert words[-1] == "--resume"
    (tmp_path / "data.yaml").write_text("tokenizer: t\nprompts: p.jsonl\n")
    # The generator is a part of its own, whose tests know its options.
    replaced = [re.sub("^--data=.*", f"--data={tmp_path / 'data.yaml'}", word) for word in words]
    given = [word for word in replaced if not word.startswith("--model.generator")]
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main([*given, "--print_config"])
    assert end.value.code in (0, None)
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["resume"] is True
    assert found["trainer"]["precision"] == "bf16-mixed"
    assert found["data"]["prompts"] == "p.jsonl"


def test_the_sampler_is_reached_by_the_trainer_alone():
    (file,) = loaded("compose.yaml")
    services = file["services"]
    assert services["vllm"]["networks"] == ["engine"]
    assert file["networks"]["engine"]["internal"] is True
    assert not any("ports" in service for service in services.values())
    assert [name for name, service in services.items() if "engine" in service.get("networks", ())] == ["train", "vllm"]
    # A version, and a folder for adapters under the same path on both sides.
    assert re.fullmatch(r"vllm/vllm-openai:v\d+\.\d+\.\d+", services["vllm"]["image"])
    assert "runs:/workspace/runs" in services["train"]["volumes"]
    assert "runs:/workspace/runs:ro" in services["vllm"]["volumes"]
    assert "--logprobs-mode=processed_logprobs" in services["vllm"]["command"]


def test_containers_have_no_rights_that_they_do_not_need():
    (file,) = loaded("compose.yaml")
    for name in ("train", "model"):
        service = file["services"][name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
    pod = next(part for part in loaded("deploy/kubernetes.yaml") if part["kind"] == "Job")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    # Everything that the image writes to has a volume.
    text = (ROOT / "Dockerfile").read_text()
    written = [*json.loads(re.search(r"^VOLUME (.*)$", text, re.MULTILINE)[1]), re.search(r"HOME=(\S+)", text)[1]]
    assert set(written) <= set(mounts)
    # Longer than a run may take to save.
    assert pod["terminationGracePeriodSeconds"] > 120


@pytest.fixture
def slurm(tmp_path):
    """Run the script of a job on a cluster whose `srun` prints its words."""
    for name, line in {"srun": 'printf "%s\\n" "$@"; exit "${CODE:-0}"', "scontrol": 'echo "scontrol $*"'}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / name).chmod(0o755)

    def call(*words, **variables):
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **variables}
        command = ["bash", str(DEPLOY / "train.slurm"), *words]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout.split("\n")[:-1]

    return call


def test_slurm_tells_the_trainer_how_many_there_are(slurm):
    user = ["ppo", "fit", "--config", "a.yaml", "--trainer.devices=1"]
    size = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}
    code, words = slurm(*user, **size)
    assert code == 0
    assert words[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=6"]
    # Last, so that they count.
    assert words[2:] == ["lit-vapo", *user, "--trainer.num_nodes=2", "--trainer.devices=4", "--resume"]
    assert slurm(*user)[1][2:] == ["lit-vapo", *user, "--resume"]


def test_slurm_queues_a_job_again_that_was_told_to_end(slurm):
    assert slurm("sft", "fit", CODE="138") == (138, [*slurm("sft", "fit")[1], "scontrol requeue 7"])
    assert "scontrol requeue 7" not in slurm("sft", "fit", CODE="138", RESTARTS="3", SLURM_RESTART_COUNT="3")[1]
    assert "scontrol requeue 7" not in slurm("sft", "fit", CODE="2")[1]


def test_slurm_runs_in_a_container(slurm, tmp_path):
    words = slurm("sft", "fit", CONTAINER="my.sqsh", MOUNTS="/data:/data")[1]
    place = f"--container-mounts={tmp_path}:{tmp_path},/data:/data"
    assert words[2:6] == ["--container-image=my.sqsh", f"--container-workdir={tmp_path}", place, "lit-vapo"]


def test_the_health_of_a_service_is_that_it_listens(tmp_path):
    import socket

    def healthy(*words):
        (tmp_path / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
        script = ["bash", str(DEPLOY / "healthcheck.sh"), str(tmp_path / "cmdline")]
        return subprocess.run(script, capture_output=True, check=False, timeout=60).returncode == 0

    with socket.socket() as service:
        service.bind(("127.0.0.1", 0))
        port = str(service.getsockname()[1])
        assert not healthy("tini", "--", "lit-vapo", "reward", "serve", "--port", port)
        service.listen()
        assert healthy("tini", "--", "lit-vapo", "reward", "serve", "--port", port)
        assert healthy("tini", "--", "lit-vapo", "reward", "serve", f"--port={port}")
    assert not healthy("tini", "--", "lit-vapo", "reward", "serve", f"--port={port}")
    # What is no service listens nowhere.
    assert healthy("tini", "--", "lit-vapo", "ppo", "fit")


def test_every_key_of_the_sweep_is_an_option(monkeypatch, capsys, tmp_path):
    (sweep,) = loaded("deploy/sweep.yaml")
    monkeypatch.chdir(ROOT)
    words = [word for word in " ".join(sweep["command"][2].split()).split() if word.startswith("--config")]
    configs = re.findall(r"--config (\S+)", sweep["command"][2])
    assert len(configs) == len(words) == 2
    for name, given in sweep["parameters"].items():
        for value in given["values"]:
            with pytest.raises(SystemExit) as end:
                main(["ppo", "fit", *(f"--config={path}" for path in configs), f"--{name}={value}", "--print_config"])
            assert end.value.code in (0, None)
            found = yaml.safe_load(capsys.readouterr().out)
            for part in name.split("."):
                found = found[part]
            assert found == value or found["class_path"].endswith(f".{value}")
    from test_metric_docs import documented  # a name of docs/metrics.md

    assert sweep["metric"]["name"] in documented()["ppo"]
