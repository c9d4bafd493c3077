"""What is tested on: parts set aside for testing, pairs from elsewhere, and rows that can be named."""

import pytest
import torch
from helpers import write_jsonl
from lightning.pytorch import LightningModule, Trainer

from lit_vapo.data.datamodule import PreferenceDataModule, PromptDataModule, SFTDataModule
from lit_vapo.data.splits import set_aside
from lit_vapo.data.tokenise import stable_id
from lit_vapo.types import FeaturePairs


def pairs(count, name="Review", **columns):
    return [{"prompt": f"{name} {i}", "chosen": " good", "rejected": " bad", **columns} for i in range(count)]


@pytest.fixture
def files(tmp_path):
    def write(name, rows):
        return write_jsonl(tmp_path / f"{name}.jsonl", rows)

    return write


def make(kind, model, file, **options):
    return kind(model, preferences=file, **{"batch_size": 4, **options})


def prompts(rows):
    return {row["identity"] for row in rows}


def test_three_parts_of_a_whole():
    rows = [{"identity": f"p{i}", "example_id": i} for i in range(4000)]
    train, val, test = set_aside(rows, 0.1, 0.2)
    assert prompts(train) | prompts(val) | prompts(test) == prompts(rows)
    assert len(train) + len(val) + len(test) == 4000
    assert abs(len(val) - 400) < 4 * 19  # √(4000 · 0.1 · 0.9)
    assert abs(len(test) - 800) < 4 * 25.3  # √(4000 · 0.2 · 0.8)
    # Either part stays what it is when the other changes.
    assert set_aside(rows, 0.1)[1] == val
    assert set_aside(rows, 0.3, 0.2)[2] == test


@pytest.mark.parametrize("kind", [PreferenceDataModule, SFTDataModule])
def test_one_file_trains_validates_and_tests(tiny_model_dir, files, kind):
    data = make(kind, tiny_model_dir, files("pairs", pairs(200)), validation_fraction=0.2, test_fraction=0.3)
    parts = [prompts(data.preference_rows(split)) for split in ("train", "val", "test")]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200
    # Prompts to respond to fall into the same parts.
    ppo = make(PromptDataModule, tiny_model_dir, files("pairs", pairs(200)), validation_fraction=0.2, test_fraction=0.3)
    assert [prompts(ppo.prompt_rows(split)) for split in ("train", "val", "test")] == parts


def test_a_file_for_testing_leaves_the_test_fraction_in_training(tiny_model_dir, files):
    options = {"preferences_test": files("test", pairs(5, "Other")), "test_fraction": 0.3, "validation_fraction": 0.0}
    data = make(PreferenceDataModule, tiny_model_dir, files("pairs", pairs(50)), **options)
    assert [len(data.preference_rows(split)) for split in ("train", "val", "test")] == [50, 0, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_fraction": 1.0}, "data.test_fraction: expected a number from 0 to below 1, got 1.0"),
        ({"test_fraction": -0.1}, "data.test_fraction: expected a number from 0 to below 1, got -0.1"),
        (
            {"test_fraction": 0.5, "validation_fraction": 0.5},
            "data.test_fraction: expected less than 1 together with data.validation_fraction, got 1.0",
        ),
    ],
)
def test_fractions_leave_something_to_train_on(tiny_model_dir, options, message):
    with pytest.raises(ValueError, match=message):
        make(PreferenceDataModule, tiny_model_dir, "pairs.jsonl", **options)


def served(loader):
    return [i for batch in loader for i in batch.labels.example_ids.tolist()]


def test_a_test_serves_test_validation_and_pairs_from_elsewhere(tiny_model_dir, files):
    data = make(
        PreferenceDataModule,
        tiny_model_dir,
        files("pairs", pairs(100)),
        validation_fraction=0.2,
        test_fraction=0.2,
        preferences_ood=files("ood", pairs(7, "Elsewhere")),
    )
    loaders = data.test_dataloader()
    assert list(loaders) == data.test_splits() == ["test", "val", "ood"]
    for split, loader in loaders.items():
        assert served(loader) == [row["example_id"] for row in data.preference_rows(split)]
    assert len(served(loaders["ood"])) == 7


@pytest.mark.parametrize(
    ("fraction", "ood", "expected"),
    [(0.2, False, ["test"]), (0.0, True, ["ood"]), (0.0, False, [])],
)
def test_splits_without_rows_have_no_loader(tiny_model_dir, files, fraction, ood, expected):
    given = files("ood", pairs(7, "Elsewhere")) if ood else None
    data = make(
        PreferenceDataModule,
        tiny_model_dir,
        files("pairs", pairs(50)),
        validation_fraction=fraction,
        preferences_ood=given,
    )
    assert data.test_splits() == list(data.test_dataloader()) == expected
    # As ever, pairs set aside for validation are tested on where there is nothing else.
    assert data.preference_rows("test") == data.preference_rows("val")
    assert len(data.preference_rows("ood")) == 7 * ood


class Counting(LightningModule):
    """Counts the pairs of every loader."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen[dataloader_idx] = self.seen.get(dataloader_idx, 0) + len(batch.labels.weight)


@pytest.mark.filterwarnings("ignore:Total length of:UserWarning")
@pytest.mark.parametrize(("fraction", "ood"), [(0.3, True), (0.0, True), (0.3, False), (0.0, False)])
def test_a_trainer_numbers_the_loaders_in_the_order_of_the_splits(tiny_model_dir, files, fraction, ood):
    data = make(
        PreferenceDataModule,
        tiny_model_dir,
        files("pairs", pairs(12)),
        validation_fraction=fraction,
        preferences_ood=files("ood", pairs(3, "Elsewhere")) if ood else None,
    )
    module = Counting()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(accelerator="cpu", enable_model_summary=False, **options).test(module, datamodule=data, verbose=False)
    assert module.seen == {i: len(data.preference_rows(split)) for i, split in enumerate(data.test_splits())}


def test_features_are_served_for_pairs_from_elsewhere(tiny_model_dir, files):
    data = make(
        PreferenceDataModule,
        tiny_model_dir,
        files("pairs", pairs(20)),
        preferences_ood=files("ood", pairs(3, "Elsewhere", weight=2)),
    )
    assert len(data.preferences("ood").chosen) == 3
    chosen = torch.arange(12.0).view(3, 2, 2)
    data.use_features("ood", chosen, -chosen)
    (batch,) = data.test_dataloader()["ood"]
    assert isinstance(batch, FeaturePairs)
    assert batch.chosen.tolist() == chosen.tolist()
    assert batch.labels.weight.tolist() == [2, 2, 2]


def test_bad_rows_from_elsewhere_are_named_before_training(tiny_model_dir, files):
    bad = files("bad", [{"prompt": "p", "chosen": "a"}])
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: expected column 'rejected'"):
        make(PreferenceDataModule, tiny_model_dir, files("pairs", pairs(20)), preferences_ood=bad).prepare_data()


def test_the_longest_pair_may_be_one_from_elsewhere(tiny_model_dir, files):
    far = files("ood", [{"prompt": "p", "chosen": "a", "rejected": "b" * 90}])
    data = make(PreferenceDataModule, tiny_model_dir, files("pairs", pairs(20)), preferences_ood=far)
    assert data.longest_pair() == len(data.preference_rows("ood")[0]["rejected_ids"])


def test_rows_know_their_place(tiny_model_dir, files):
    file = files("pairs", pairs(20))
    data = make(PreferenceDataModule, tiny_model_dir, file, preferences_ood=files("ood", pairs(3, "Elsewhere")))
    where = {row["prompt"]: row["place"] for split in ("train", "val") for row in data.preference_rows(split)}
    assert where == {f"Review {i}": f"{file}, line {i + 1}" for i in range(20)}
    assert data.place(stable_id("Review 7", " good", " bad")) == f"{file}, line 8"
    assert data.place(stable_id("Elsewhere 2", " good", " bad")).endswith("ood.jsonl, line 3")
    assert data.place(3) == "pair 3"


@pytest.mark.parametrize(
    "columns",
    [{"tie": True}, {"agreement": 0.5}, {"weight": 0}],
)
def test_pairs_that_teach_nothing_are_refused(tiny_model_dir, files, columns):
    message = "data.preferences: expected at least one pair with a preference, got only ties"
    rows = pairs(20, **columns)
    with pytest.raises(ValueError, match=message):
        make(PreferenceDataModule, tiny_model_dir, files("ties", rows)).prepare_data()
    # A preference that is set aside teaches nothing either; one that is not is enough.
    data = make(PreferenceDataModule, tiny_model_dir, files("one", [*rows, *pairs(1, "Clear")]))
    data.prepare_data()
    data = make(
        PreferenceDataModule, tiny_model_dir, files("ties", rows), preferences_validation=files("val", pairs(3))
    )
    with pytest.raises(ValueError, match=message):
        data.prepare_data()
    make(SFTDataModule, tiny_model_dir, files("ties", rows)).prepare_data()


def test_subsets_and_labels_reach_the_rows_and_the_batches(tiny_model_dir, files):
    file = files("pairs", pairs(8, agreement=0.75, weight=3, subset="chat"))
    data = make(PreferenceDataModule, tiny_model_dir, file, validation_fraction=0.0)
    assert {row["subset"] for row in data.preference_rows("train")} == {"chat"}
    batch = next(iter(data.train_dataloader()))
    assert batch.labels.probability.tolist() == [0.75] * 4
    assert batch.labels.weight.tolist() == [3] * 4
