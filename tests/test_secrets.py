"""Keys and tokens that a run knows are in nothing that it leaves; and no image takes them along."""

import fnmatch
import gzip
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import CONFIGS
from services import says, service
from test_serve import served

from lit_vapo.cli import main
from lit_vapo.http_client import check_url

ROOT = Path(__file__).parents[1]
SECRETS = {
    "WANDB_API_KEY": "c0ffee" + "0123456789abcdef" * 2 + "42",
    "HF_TOKEN": "hf_Planted0Planted0Planted0Planted",
    "REWARD_TOKEN": "planted-token-of-the-reward-service",
    "OPENAI_API_KEY": "sk-planted-Planted0Planted0Planted0",
}
HTTP_WORD = "found-by-the-search"


def places(folder, text):
    """Files that hold a text: as it is, and inside of archives."""
    found = []
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        parts = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts += [archive.read(name) for name in archive.namelist()]
        if parts[0].startswith(b"\x1f\x8b"):
            parts.append(gzip.decompress(parts[0]))
        if any(text.encode() in part for part in parts):
            found.append(path.relative_to(folder))
    return found


def test_a_run_leaves_no_secret(stage_args, tmp_path):
    def rewards(number, body):
        return says(body={"rewards": [float(len(row["response"])) for row in body["rows"]]})

    with service(rewards) as there:
        more = [
            f"--config={CONFIGS / 'logger' / 'wandb.yaml'}",
            f"--trainer.logger.init_args.save_dir={tmp_path}",
            "--trainer.logger.init_args.offline=true",
            "--model.reward=RemoteReward",
            f"--model.reward.url={there.url}/{HTTP_WORD}",
            "--model.reward.token_env=REWARD_TOKEN",
            "--model.objective=MeanReward",
        ]
        words = stage_args("ppo", "fit", tmp_path / "run", *more)
        # As somebody types it: W&B also notes the command line.
        done = subprocess.run(
            [sys.executable, "-m", "lit_vapo", *words],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"} | SECRETS | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr.decode()
        # They were there to be leaked.
        assert {h.get("Authorization") for h in there.headers} == {f"Bearer {SECRETS['REWARD_TOKEN']}"}
    (tmp_path / "printed.log").write_bytes(done.stdout + done.stderr)
    # The search finds what is no secret, wherever a secret might be.
    seen = {path.suffix or path.name for path in places(tmp_path, HTTP_WORD)}
    assert {".yaml", ".ckpt", ".wandb"} <= seen
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"metrics.csv", "config.yaml", "last.ckpt", "printed.log"} <= names
    # W&B knows the command line.
    assert {path.suffix for path in places(tmp_path, "reward.token_env=REWARD_TOKEN")} >= {".wandb"}
    for name, secret in SECRETS.items():
        assert places(tmp_path, secret) == [], name


def test_a_service_tells_no_secret(stage_args, tiny_ensemble_dir, tmp_path):
    from test_serve import request

    words = (f"--reward={tiny_ensemble_dir}", "--token_env=REWARD_TOKEN")
    with served(*words, **SECRETS) as (url, process):
        status, answer = request(url, body=b"{", Authorization=f"Bearer {SECRETS['REWARD_TOKEN']}")
        assert status == 400
        assert SECRETS["REWARD_TOKEN"] not in str((answer, request(url), request(url, "GET"), process.args))
        process.terminate()
        printed = process.stdout.read() + process.stderr.read()
    assert not [secret for secret in SECRETS.values() if secret in printed]
    assert [path for secret in SECRETS.values() for path in places(Path(tiny_ensemble_dir), secret)] == []


@pytest.mark.parametrize(
    ("option", "key"),
    [
        (
            {"class_path": "WandbLogger", "init_args": {"settings": {"api_key": "SECRET-WORD"}}},
            r"trainer.logger(\[0\])?.init_args.settings.api_key",
        ),
        (
            [{"class_path": "WandbLogger", "init_args": {"config": {"my_password": "SECRET-WORD"}}}],
            r"trainer.logger\[0\].init_args.config.my_password",
        ),
    ],
)
def test_an_option_with_the_name_of_a_secret_is_refused(stage_args, tmp_path, untrained, option, key):
    import json

    file = tmp_path / "logger.yaml"
    file.write_text(json.dumps({"trainer": {"logger": option}}))
    with pytest.raises(ValueError, match=rf"^{key}: expected no secret among the options") as error:
        main(stage_args("sft", "fit", tmp_path / "run", f"--config={file}"))
    assert "SECRET-WORD" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["token_env", "tokenizer", "pad_token", "stop_token_ids", "key", "secretary"])
def test_other_names_are_none_of_a_secret(name):
    from lit_vapo.commands.options import refuse_secrets

    refuse_secrets({name: "text", "api_key": None, "inner": [{"password": ""}]})


@pytest.mark.parametrize("query", ["api_key=word", "a=1&access_token=word", "X-Amz-Signature=word", "sig=word"])
def test_an_address_has_no_secret_either(query):
    with pytest.raises(ValueError, match="reward.url: expected no password in it") as error:
        check_url(f"https://there/score?{query}", "reward.url")
    assert "word" not in str(error.value).replace("password", "")
    check_url("https://there/score?model=big&version=3", "reward.url")


# The image.


def copied():
    """What the Dockerfile copies from the folder of the build."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return {w for line in lines if re.match("COPY (?!--from)", line) for w in line.split()[1:-1] if w[:2] != "--"}


def taken(path):
    """Whether .dockerignore lets a file into the build: the last rule that fits it or a folder around it decides."""
    parts = path.split("/")
    heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    found = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = rule.removeprefix("!")
        if not rule or rule.startswith("#"):
            continue
        patterns = [pattern, pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
        # A star of a rule stays within a folder; only `*` itself and `**/…` meet paths here.
        tried = heads[:1] if pattern == "*" else heads
        if any(fnmatch.fnmatchcase(head, p) for head in tried for p in patterns):
            found = rule.startswith("!")
    return found


def test_an_image_takes_what_it_is_made_of():
    pins, script = {"constraints-cpu.txt", "locks"}, "deploy/healthcheck.sh"
    assert copied() == {"pyproject.toml", *pins, "README.md", "LICENSE", "lit_vapo", "configs", script}
    for path in (
        "pyproject.toml",
        "locks/cuda.txt",
        script,
        "lit_vapo/cli.py",
        "configs/logger/wandb.yaml",
        "lit_vapo/study/experiment.py",
    ):
        assert taken(path), path


@pytest.mark.parametrize("folder", ["", "lit_vapo/", "configs/ppo/"])
def test_an_image_takes_no_secret(folder):
    for path in (".env", ".env.local", ".netrc", "wandb/run/files/x", "runs/ppo/last.ckpt", ".git/config"):
        assert not taken(folder + path), folder + path
    assert not re.search("netrc|API_KEY|HF_TOKEN", (ROOT / "Dockerfile").read_text())
