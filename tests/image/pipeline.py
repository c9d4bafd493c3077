"""What `make image` runs inside of the image: the tiny pipeline, as a user without a name, on a root that is read-only.

It is no test of its own; `scripts/image.sh` starts it and looks at the exit code.
"""

import json
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import helpers

RUNS = Path("/workspace/runs")
CONFIGS = Path("/workspace/configs")


def check(condition, sentence):
    if not condition:
        sys.exit(f"image: expected {sentence}")
    print(f"image: {sentence}", flush=True)


def command(*words):
    print("$ lit-vapo", *words, flush=True)
    subprocess.run(["lit-vapo", *map(str, words)], check=True)


def nameless():
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return True
    return False


def read_only(folder):
    try:
        Path(folder, "written").touch()
    except OSError as error:
        return error.errno == 30
    return False


def healthy(process):
    return subprocess.run(["healthcheck", f"/proc/{process.pid}/cmdline"], check=False).returncode == 0


def options(stage, run, **more):
    given = {"config": CONFIGS / stage / "tiny.yaml", "trainer.default_root_dir": run, **more}
    return [f"--{name}={value}" for name, value in given.items()]


def pipeline(model, pairs, prompts):
    data = {"model.base.path": model, "data.tokenizer": model}
    command("reward", "fit", *options("reward", RUNS / "reward", **data, **{"data.preferences": pairs}))
    command("export", f"--checkpoint={RUNS}/reward/checkpoints/last.ckpt", f"--output={RUNS}/ensemble")
    data |= {"data.prompts": prompts, "model.reward": RUNS / "ensemble"}
    wandb = [f"--config={CONFIGS}/logger/wandb.yaml", "--trainer.logger.init_args.offline=true"]
    command("ppo", "fit", *options("ppo", RUNS / "ppo", **data), *wandb)
    command("export", f"--checkpoint={RUNS}/ppo/checkpoints/last.ckpt", f"--output={RUNS}/policy")
    check(json.loads((RUNS / "ppo" / "finished.json").read_text())["steps"] > 0, "a run of PPO that is finished")
    check(any(RUNS.glob("wandb/offline-run-*/run-*.wandb")), "what W&B wrote offline")
    two = {"trainer.devices": 2, "trainer.strategy": "ddp"}
    command("ppo", "fit", *options("ppo", RUNS / "two", **data, **two))
    check((RUNS / "two" / "finished.json").is_file(), "a run of two processes that is finished")


def service():
    words = ["lit-vapo", "reward", "serve", f"--ensemble={RUNS}/ensemble", "--port=8123"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        check("listening" in process.stdout.readline(), "a service of rewards")
        check(healthy(process), "that it is healthy")
        process.terminate()
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)", "lit-vapo", "reward", "serve", "--port", "8124"]
    with subprocess.Popen(sleeper) as process:
        time.sleep(0.5)
        check(not healthy(process), "that a service which does not listen is not healthy")
        process.kill()


def main():
    check(nameless(), f"a user without a name ({os.getuid()})")
    check(read_only("/") and read_only("/opt/venv") and read_only("/workspace"), "a root that is read-only")
    subprocess.run(["git", "--version"], check=True)
    subprocess.run(["tini", "--version"], check=True)
    # What the extra `study` brings.
    command("study", "--help")
    folder = Path("/tmp/pipeline")
    folder.mkdir()
    model = helpers.tiny_model(folder / "model", helpers.tiny_tokenizer(folder / "model", chat_template=True))
    pairs, prompts = helpers.tiny_preferences(folder / "pairs.jsonl"), helpers.tiny_prompts(folder / "prompts.jsonl")
    pipeline(model, pairs, prompts)
    service()
    compiled = "import torch; print(torch.compile(lambda x: (2 * x).sin().sum())(torch.ones(1000)))"
    subprocess.run([sys.executable, "-c", compiled], check=True)
    check(any(Path("/cache/inductor").rglob("*.so")), "what torch.compile has compiled")


if __name__ == "__main__":
    main()
