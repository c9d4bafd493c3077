"""A run written by the W&B logger offline, read back from its file; and the sample table on disk."""

import json
import struct
import time
from types import SimpleNamespace

import ppo_helpers
import pytest
from helpers import CONFIGS, last, read_jsonl
from lightning.pytorch import LightningModule

from lit_vapo.callbacks.samples import SampleTable
from lit_vapo.cli import main

pytest.importorskip("wandb")

BLOCK, HEADER = 32768, 7


def finished(path, seconds=20):
    """All records of a run, once the one that ends it has been written."""
    found = []
    for _ in range(seconds * 10):
        found = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            break
        time.sleep(0.1)
    return found


def records(path):
    """Protobuf records of a .wandb file: a LevelDB log after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), HEADER, []
    assert data.startswith(b":W&B")
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        # 1 whole, 2 first, 3 middle, 4 last part of a record.
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    reward = ppo_helpers.ensemble(folder / "ensemble", tiny_model_dir)
    ppo_helpers.prompt_data(tiny_model_dir, folder)
    root = folder / "run"
    options = {
        "trainer.default_root_dir": root,
        "trainer.limit_train_batches": 1,
        "model.base.path": tiny_model_dir,
        "model.reward": reward,
        "data.tokenizer": tiny_model_dir,
        "data.prompts": folder / "ppo_prompts.jsonl",
        "data.validation_fraction": 0.5,
    }
    configs = ["--config=configs/ppo/tiny.yaml", "--config=configs/logger/wandb.yaml"]
    # Given after the file that adds the logger.
    logger = [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.logger.init_args.offline=true"]
    main(["ppo", "fit", *configs, *logger, *(f"--{key}={value}" for key, value in options.items())])
    import wandb

    wandb.finish()
    return folder


def test_an_offline_run_holds_metrics_configuration_and_samples(run):
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    history, config = {}, {}
    for record in finished(file):
        for item in record.history.item:
            history[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for update in (*record.run.config.update, *record.config.update):
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    assert {"train/reward_mean", "train/kl_weighted_k3", "val/reward_mean"} <= set(history)
    csv = (run / "run").glob("logs/version_*/metrics.csv")
    names = set(next(csv).read_text().splitlines()[0].split(",")) - {"step", "epoch"}
    assert names <= set(history)

    full = config["lit_vapo"]
    assert full["trainer"]["limit_train_batches"] == 1
    assert full["data"]["max_prompt_length"] == 32
    assert full["model"]["update"]["minibatches"] == 2
    assert full["seed_everything"] == 0

    assert history["val/samples/_type"] == "table-file"
    (table,) = run.glob("wandb/offline-run-*/files/media/table/val/samples_*.table.json")
    table = json.loads(table.read_text())
    assert {"prompt", "response", "sigma", "kl", "member_0", "member_2"} <= set(table["columns"])
    written = read_jsonl(run / "run" / "samples_val.jsonl")
    column = table["columns"].index("response")
    assert [row[column] for row in table["data"]] == [record["response"] for record in written][: len(table["data"])]


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_test_of_an_ensemble_leaves_tables_and_pictures(stage_args, reward_run, tiny_model_dir, tmp_path):
    options = [
        f"--config={CONFIGS / 'logger' / 'wandb.yaml'}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.logger.init_args.offline=true",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]
    main(stage_args("reward", "test", tmp_path / "run", *options, ckpt_path=last(reward_run)))
    import wandb

    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    keys = {i.key or "/".join(i.nested_key) for r in finished(file) for i in r.history.item}
    assert {"test/accuracy", "test/error_auroc", "test/members/_type", "test/risk_coverage/_type"} <= keys
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/test/members_*.table.json")
    rows = json.loads(table.read_text())["data"]
    found = json.loads((tmp_path / "run" / "test" / "evaluation.json").read_text())
    assert [row[0] for row in rows] == ["0", "1", "2", "mean"]
    assert rows[-1][1:] == list(found["mean"].values())
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/test/*.png"))) == 3


def trainer_at(folder, step, fn="fit", **kwargs):
    state = SimpleNamespace(fn=fn)
    defaults = {"default_root_dir": str(folder), "global_step": step, "is_global_zero": True, "loggers": []}
    return SimpleNamespace(**{**defaults, "sanity_checking": False, "state": state, **kwargs})


def module_with(records):
    module = LightningModule()
    module.samples = records
    return module


def test_samples_of_all_evaluations_stay_on_disk(tmp_path):
    table = SampleTable()
    table.setup(trainer_at(tmp_path, 0), module_with([]), "fit")
    for step in (4, 8):
        table.on_validation_end(trainer_at(tmp_path, step), module_with([{"response": f"at {step}", "members": []}]))
    table.on_validation_end(trainer_at(tmp_path, 8, sanity_checking=True), module_with([{"response": "no"}]))
    table.on_validation_end(trainer_at(tmp_path, 9, is_global_zero=False), module_with([{"response": "no"}]))
    table.on_validation_end(trainer_at(tmp_path, 9), module_with([]))
    found = read_jsonl(tmp_path / "samples_val.jsonl")
    assert [(r["step"], r["response"]) for r in found] == [(4, "at 4"), (8, "at 8")]


def test_a_test_s_samples_replace_the_last_test_s(tmp_path):
    for response in ("one", "two"):
        SampleTable().on_test_end(trainer_at(tmp_path, 3, "test"), module_with([{"response": response}]))
    assert [r["response"] for r in read_jsonl(tmp_path / "test" / "responses.jsonl")] == ["two"]
