"""Streams: every row once whoever reads, another order in every epoch, little padding, nothing read ahead of need."""

import itertools
import json
import math
import random
import warnings
from collections import Counter

import datasets
import pytest
import torch
import yaml
from helpers import last, tiny_tokenizer, write_jsonl
from lightning.pytorch import LightningModule, Trainer

from lit_vapo.cli import main
from lit_vapo.data.collate import PreferenceBatch, SFTBatch
from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule, SFTDataModule
from lit_vapo.data.encoder import Encoder
from lit_vapo.data.place import StreamLoader
from lit_vapo.data.readers import PairReader
from lit_vapo.data.stream import LOOK, PairStream, Shard, by_length

COUNT = 203


def pairs(count=COUNT, name="Review"):
    return [
        {"prompt": f"{name} {i}:", "chosen": " good" * (1 + i * 7 % 20), "rejected": " bad", "margin": i}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("stream") / "tokenizer")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("stream") / "pairs.jsonl", pairs())


def make(tokenizer, sources, **options):
    return PairStream(sources, "data.preferences", PairReader(Encoder(tokenizer), 64), **{"batch_size": 4, **options})


def data(kind, model, sources, **options):
    given = {"streaming": True, "validation_fraction": 0.0, "batch_size": 4, "max_length": 64, **options}
    return kind(model, preferences=sources, **given)


def ids(rows):
    return [row["example_id"] for row in rows]


def served(loader):
    return [i for batch in loader for i in batch.labels.example_ids.tolist()]


@pytest.mark.parametrize("buffer", [8, 50, 10_000])
def test_an_epoch_has_every_pair_once_in_an_order_of_seed_and_epoch(tokenizer, file, buffer):
    stream = make(tokenizer, file, buffer=buffer)
    first = list(stream)
    assert sorted(row["margin"] for row in first) == list(range(COUNT))
    assert first[0]["place"] == f"{file}, line {first[0]['margin'] + 1:.0f}"
    assert ids(stream) == ids(first)
    stream.set_epoch(1)
    second = ids(stream)
    assert sorted(second) == sorted(ids(first))
    assert second != ids(first)
    assert ids(make(tokenizer, file, buffer=buffer, seed=1)) != ids(first)


def length(row):
    return max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def padded(rows):
    return sum(4 * max(map(length, rows[i : i + 4])) for i in range(0, len(rows) - 3, 4))


def test_batches_are_of_similar_length(tokenizer, file):
    rows = list(make(tokenizer, file, buffer=80))
    shuffled = random.Random(0).sample(rows, COUNT)
    assert padded(rows) < 1.15 * sum(map(length, rows))
    assert padded(shuffled) > 1.3 * sum(map(length, rows))
    # Short pairs do not all come before long ones.
    longest = [max(map(length, rows[i : i + 4])) for i in range(0, 40, 4)]
    assert longest != sorted(longest)


def test_a_buffer_reaches_further_than_its_size():
    rows = [{"chosen_ids": [0], "rejected_ids": [], "n": i} for i in range(1000)]
    order = [row["n"] for row in by_length(iter(rows), 5, 100, random.Random(0))]
    assert sorted(order) == list(range(1000))
    # Half of the buffer stays whenever the other half goes, so some row waits for several rounds.
    assert max(place - n for place, n in enumerate(order)) > 100


def test_the_buffer_bounds_what_is_read_ahead():
    read = []

    def rows():
        for i in range(1000):
            read.append(i)
            yield {"chosen_ids": [0] * (i % 9), "rejected_ids": [], "n": i}

    next(by_length(rows(), 5, 20, random.Random(0)))
    assert len(read) == 20


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_processes_share_the_pairs_without_overlap(tokenizer, file, replicas):
    parts = [ids(make(tokenizer, file, num_replicas=replicas, rank=rank)) for rank in range(replicas)]
    together = list(itertools.chain(*parts))
    assert len(set(together)) == len(together) == COUNT // replicas * replicas
    assert len({len(part) for part in parts}) == 1


def test_parts_of_a_stream_are_even_only_on_request():
    rows = list(range(8))
    assert [list(Shard(i, 3).take(iter(rows))) for i in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert [list(Shard(i, 3, even=True).take(iter(rows))) for i in range(3)] == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_workers_share_the_pairs_and_learn_of_the_epoch(tiny_model_dir, file, tmp_path, monkeypatch, kind):
    source = file
    if kind != "jsonl":
        source = str(tmp_path / "pairs.parquet")
        datasets.Dataset.from_list(pairs()).to_parquet(source)
    if kind == "hub":
        table = datasets.load_dataset("parquet", data_files=source, split="train", streaming=True)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
        source = "org/set"
    loader = data(PreferenceDataModule, tiny_model_dir, source, num_workers=2, stream_buffer=40).train_dataloader()
    first, second = served(loader), served(loader)
    assert len(set(first)) == len(first) == COUNT
    assert sorted(first) == sorted(second)
    assert first != second


def test_ranks_of_the_trainer_share_the_pairs(tiny_model_dir, file):
    parts = []
    for rank in range(2):
        module = data(PreferenceDataModule, tiny_model_dir, file)
        ranks = {"num_replicas": 2, "rank": rank}
        shares = type("Shares", (Trainer,), {"distributed_sampler_kwargs": ranks})
        module.trainer = shares(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=5)
        parts.append(served(module.train_dataloader()))
    assert set(parts[0]).isdisjoint(parts[1])
    assert [len(part) for part in parts] == [COUNT // 2] * 2


class Recorder(LightningModule):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.labels.example_ids.tolist()))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        raise AssertionError("nothing was set aside")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    recorder = Recorder()
    trainer = Trainer(accelerator="cpu", limit_val_batches=0, enable_checkpointing=False, **quiet, **options)
    trainer.fit(recorder, datamodule=module)
    return recorder.seen


def test_a_trainer_goes_through_epochs_and_stops_at_max_steps(tiny_model_dir, file, tokenizer):
    steps = -(-COUNT // 4)
    seen = fit(data(PreferenceDataModule, tiny_model_dir, file), max_steps=2 * steps + 3)
    assert [epoch for epoch, _ in seen] == [0] * steps + [1] * steps + [2] * 3
    stream = make(tokenizer, file)
    for epoch in range(2):
        stream.set_epoch(epoch)
        batches = [i for at, batch in seen for i in batch if at == epoch]
        assert batches == ids(stream)


class Course:
    """A run that has come so far, and trains on so many batches of an epoch at most."""

    def __init__(self, batches, most=math.inf):
        self.batches = batches
        self.most = most

    def taken(self):
        return self.batches

    def limit(self, batches):
        return min(batches, self.most)


@pytest.mark.parametrize("most", [math.inf, 3])
def test_a_stream_finds_its_place_by_what_was_taken(tokenizer, tmp_path, most):
    stream = make(tokenizer, write_jsonl(tmp_path / "few.jsonl", pairs(18)), buffer=8)
    loader = StreamLoader(stream, Course(0, most), batch_size=4, collate_fn=ids)
    length = int(min(5, most))
    whole, states = [], []
    for _ in range(3):
        for batch in itertools.islice(loader, length):
            states.append(loader.state_dict())
            loader.course.batches += 1
            whole.append(batch)
    assert len({i for batch in whole[:length] for i in batch}) == min(18, 4 * length)
    # A batch is read ahead of need, so that the last of an epoch is known for the last: what counts is what was taken.
    for taken, state in enumerate(states, start=1):
        for known in (state, {}):
            resumed = StreamLoader(stream, Course(taken, most), batch_size=4, collate_fn=ids)
            resumed.load_state_dict(known)
            left = length - taken % length
            assert list(resumed)[:left] == whole[taken : taken + left] or taken == len(whole)


def test_an_empty_stream_ends(tokenizer, file):
    stream = make(tokenizer, file)
    stream.pairs = lambda shard: iter(())
    assert list(StreamLoader(stream, Course(0), batch_size=4)) == []


def test_a_run_on_a_stream_needs_an_end(tiny_model_dir, file):
    with pytest.raises(ValueError, match="trainer.max_steps: expected the steps of a run on data that streams, got -1"):
        fit(data(PreferenceDataModule, tiny_model_dir, file), max_epochs=1)


def test_mixtures_stream_in_their_shares(tokenizer, tmp_path):
    sources = {write_jsonl(tmp_path / f"{n}.jsonl", pairs(c, n)): r for n, c, r in (("a", 600, 0.75), ("b", 600, 0.25))}
    found = Counter(row["prompt"][0] for row in make(tokenizer, sources))
    assert found["a"] == 600
    # The count of b before the 601st a is negative binomial: mean 601 / 3, deviation √(601 · 0.25) / 0.75.
    assert abs(found["b"] - 200) < 4 * 16.4


# Invalid rows.


def bad_rows(*numbers):
    return [{**row, "chosen": " "} if i in numbers else row for i, row in enumerate(pairs(20))]


def test_an_invalid_row_stops_the_stream_with_its_place(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "bad.jsonl", [*pairs(12), {"prompt": "p", "chosen": 3, "rejected": "b"}])
    with pytest.raises(ValueError, match=r"bad.jsonl, line 13: expected text or messages in column 'chosen', got"):
        list(make(tokenizer, file))


@pytest.mark.parametrize("skip_invalid", [False, True])
def test_rows_of_no_use_are_left_out_and_counted(tokenizer, tmp_path, skip_invalid):
    file = write_jsonl(tmp_path / "bad.jsonl", bad_rows(3, 12))
    with pytest.warns(UserWarning, match="data.preferences") as caught:
        rows = list(make(tokenizer, file, skip_invalid=skip_invalid))
    assert sorted(row["margin"] for row in rows) == [i for i in range(20) if i not in (3, 12)]
    assert [str(w.message) for w in caught] == [
        f"data.preferences: {what}; the first: {file}, line 4: expected a response in column 'chosen', got an empty one"
        for what in ("rows are left out", "left out 2 of 20 rows (an empty response)")
    ]


@pytest.mark.filterwarnings("ignore:data.preferences:UserWarning")
@pytest.mark.parametrize("numbers", [(3, 12, 14), (0, 2)])
def test_processes_stay_in_step_where_rows_are_left_out(tokenizer, tmp_path, numbers):
    file = write_jsonl(tmp_path / "bad.jsonl", bad_rows(*numbers))
    parts = [list(make(tokenizer, file, skip_invalid=True, num_replicas=2, rank=rank)) for rank in range(2)]
    assert [len(part) for part in parts] == [10, 10]
    counted = [row["margin"] for part in parts for row in part if row.get("counts", True)]
    assert sorted(counted) == [i for i in range(20) if i not in numbers]
    assert sum(row.get("counts") is False for part in parts for row in part) == len(numbers)


@pytest.mark.filterwarnings("ignore:data.preferences. rows are left out:UserWarning")
def test_a_stream_without_a_valid_row_is_refused(tiny_model_dir, tmp_path):
    file = write_jsonl(tmp_path / "bad.jsonl", bad_rows(*range(20)))
    with pytest.raises(ValueError, match="data.preferences: expected at least one valid row, got none of 20"):
        data(PreferenceDataModule, tiny_model_dir, file, skip_invalid=True).prepare_data()


# What a datamodule makes of it.


@pytest.mark.parametrize(("kind", "batch"), [(PreferenceDataModule, PreferenceBatch), (SFTDataModule, SFTBatch)])
def test_stages_that_stream(tiny_model_dir, file, kind, batch):
    module = data(kind, tiny_model_dir, file)
    module.prepare_data()
    assert module.streams
    batches = list(module.train_dataloader())
    assert all(isinstance(b, batch) for b in batches)
    assert len(batches) == -(-COUNT // 4)
    assert module.longest_pair() == 64


def test_the_seed_of_the_data_decides_the_order_of_a_stream(tiny_model_dir, file):
    orders = [served(data(PreferenceDataModule, tiny_model_dir, file, seed=s).train_dataloader()) for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_all_pairs_come_in_their_order_to_every_process(tiny_model_dir, file):
    module = data(PreferenceDataModule, tiny_model_dir, file)
    module.trainer = type("Shares", (Trainer,), {"distributed_sampler_kwargs": {"num_replicas": 2, "rank": 1}})(
        logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    margins = [m for batch in module.all_pairs() for m in batch.labels.margin.tolist()]
    assert margins == list(range(COUNT))


def test_only_training_pairs_stream(tiny_model_dir, file, tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", pairs(5, "Other"))
    module = data(PreferenceDataModule, tiny_model_dir, file, preferences_validation=few, validation_fraction=0.1)
    assert [len(module.preference_rows(split)) for split in ("val", "test", "ood")] == [5, 5, 0]
    message = r"data.streaming: expected a split that is held \(val, test, ood\), got train, which streams"
    for ask in (module.preference_rows, module.preferences):
        with pytest.raises(ValueError, match=message):
            ask("train")
    zeros = torch.zeros(5, 2)
    module.use_features("val", zeros, zeros)
    assert len(next(iter(module.val_dataloader())).chosen) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 0.1}, "expected data.preferences_validation or a data.validation_fraction of 0"),
        ({"test_fraction": 0.1}, "expected data.preferences_test or a data.test_fraction of 0, since nothing is set"),
        ({"stream_buffer": 7}, r"data.stream_buffer: expected at least two batches \(8 pairs\), got 7"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tiny_model_dir, file, options, message):
    with pytest.raises(ValueError, match=message):
        data(PreferenceDataModule, tiny_model_dir, file, **options)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_stages_run_on_a_mixture_that_streams(stage_args, tmp_path, stage):
    sources = {write_jsonl(tmp_path / f"{name}.jsonl", pairs(20, name)): 1 for name in "ab"}
    held = write_jsonl(tmp_path / "held.jsonl", pairs(6, "Held"))
    options = {"preferences": json.dumps(sources), "preferences_validation": held, "streaming": "true"}
    main(stage_args(stage, "fit", tmp_path / "run", **{f"data__{name}": value for name, value in options.items()}))
    saved = yaml.safe_load(next((tmp_path / "run").glob("logs/version_*/config.yaml")).read_text())
    assert saved["data"]["preferences"] == sources
    assert torch.load(last(tmp_path / "run"), weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("kind", [PreferenceDataModule, SFTDataModule])
def test_a_stream_of_nothing_is_named(tiny_model_dir, kind):
    with pytest.raises(ValueError, match="data.preferences: expected files or hub names, got null"):
        data(kind, tiny_model_dir, None).prepare_data()


def test_the_first_pairs_are_looked_at_before_training(tiny_model_dir, tmp_path):
    rows = pairs(LOOK + 50)
    rows[5]["chosen"] = " good" * 200
    rows[LOOK + 20]["chosen"] = ""
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    message = r"data.preferences \(the first 1000\): data.max_length = 64 cut the beginning off 1 prompts and the end"
    with pytest.warns(UserWarning, match=message):
        data(PreferenceDataModule, tiny_model_dir, file).prepare_data()
    rows[5]["chosen"] = None
    with pytest.raises(ValueError, match=r"again.jsonl, line 6: expected text or messages in column 'chosen', got"):
        data(PreferenceDataModule, tiny_model_dir, write_jsonl(tmp_path / "again.jsonl", rows)).prepare_data()


def test_a_stream_of_ties_is_refused_and_one_preference_is_enough(tiny_model_dir, tmp_path):
    ties = [{**row, "margin": None, "tie": True} for row in pairs(LOOK + 100)]
    file = write_jsonl(tmp_path / "ties.jsonl", ties)
    with pytest.raises(ValueError, match="data.preferences: expected at least one pair with a preference, got only ti"):
        data(PreferenceDataModule, tiny_model_dir, file).prepare_data()
    del ties[LOOK + 50]["tie"]
    data(PreferenceDataModule, tiny_model_dir, write_jsonl(tmp_path / "one.jsonl", ties)).prepare_data()


def test_prompts_of_a_stream_are_read_as_they_are_needed(tiny_model_dir, tmp_path):
    rows = [row for row in pairs(10) for _ in range(2)]
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    with path.open("a") as file:
        file.write("broken\n")
    module = data(PreferenceDataModule, tiny_model_dir, str(path))
    batches = module.prompt_batches("train", 6)
    assert [len(batch.prompts) for batch in batches] == [4, 2]
    assert [p for batch in batches for p in batch.prompts] == [f"Review {i}:" for i in range(6)]
    with pytest.raises(ValueError, match="pairs.jsonl, line 21: expected a JSON object"):
        module.prompt_batches("train", 11)


def test_invalid_prompts_of_a_stream_are_named_and_those_too_long_are_left_out(tiny_model_dir, tmp_path):
    rows = pairs(4)
    file = write_jsonl(tmp_path / "bad.jsonl", [{**rows[0], "prompt": 3}, *rows])
    with pytest.raises(ValueError, match="bad.jsonl, line 1: expected text or messages in column 'prompt', got"):
        data(PreferenceDataModule, tiny_model_dir, file).prompt_batches("train", 3)
    rows[1]["prompt"] = "long " * 50
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    module = data(PreferenceDataModule, tiny_model_dir, file, max_prompt_length=20)
    with pytest.warns(UserWarning, match="data.prompts: left out 1 of 4 rows .a prompt longer.*; the first: .*line 2"):
        (batch,) = module.prompt_batches("train", 3)
    assert batch.prompts == ["Review 0:", "Review 2:", "Review 3:"]


def test_prompts_of_their_own_are_held_and_ppo_needs_them(tiny_model_dir, file, tmp_path):
    own = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Film {i}:"} for i in range(6)])
    module = data(PromptDataModule, tiny_model_dir, file, prompts=own)
    assert len(next(iter(module.train_dataloader())).prompts) == 4
    assert module.prompt_batches("train", 1)[0].prompts == ["Film 0:"]
    with pytest.raises(ValueError, match="data.prompts: expected files or hub names beside preferences that stream, g"):
        data(PromptDataModule, tiny_model_dir, file).prepare_data()


def test_a_pair_of_a_stream_is_found_by_its_identity(tiny_model_dir, file, tokenizer):
    module = data(PreferenceDataModule, tiny_model_dir, file)
    row = next(row for row in make(tokenizer, file) if row["margin"] == 150)
    assert module.place(row["example_id"]) == f"{file}, line 151"
    assert module.place(1) == "pair 1"


def test_nothing_is_said_of_a_stream_in_order(tiny_model_dir, file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = data(PreferenceDataModule, tiny_model_dir, file)
        module.prepare_data()
        assert len(served(module.train_dataloader())) == COUNT
