"""Checkpoints that are torn, damaged, hostile or something else: each is refused by one sentence."""

import io
import pickle
import random
import zipfile
from collections import OrderedDict

import pytest
import torch

from lit_vapo.commands.resume import read
from lit_vapo.stages.checkpoint_file import read_checkpoint

ADVICE = ("weights_only", "torch.load", "miniz", "internal")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def contents(**replaced):
    """As few parts as a checkpoint has."""
    generator = torch.Generator().manual_seed(0)
    return {
        "state_dict": OrderedDict(weight=torch.randn(16, 16, generator=generator), calibrated=torch.tensor(True)),
        "hyper_parameters": {"rate": 0.1, "head": {"class_path": "a.B", "init_args": {}}},
        "pytorch-lightning_version": "2.6.6",
        "lit_vapo_stage": "reward",
        "lit_vapo_figures": {"val/nll": 0.5, "val/odd": float("nan")},
        "epoch": 1,
        "global_step": 3,
        "loops": {"fit_loop": {}},
        "optimizer_states": [{"state": {0: {"step": torch.ones(())}}, "param_groups": []}],
        **replaced,
    }


@pytest.fixture
def file(tmp_path):
    """A sound checkpoint."""
    torch.save(contents(), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def refusal(path):
    """The one sentence that refuses a file."""
    with pytest.raises(ValueError, match="--ckpt_path: expected a checkpoint, got ") as caught:
        read(path, "--ckpt_path")
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not [word for word in ADVICE if word in message]
    # What the reader said is not shown beside it either.
    assert caught.value.__suppress_context__
    return message


def test_a_sound_checkpoint_is_read_as_it_was_written(file):
    found, expected = read_checkpoint(file, "--checkpoint"), contents()
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)
    assert found["hyper_parameters"] == expected["hyper_parameters"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\n", "Git LFS pointer of"),
        (b'{"prompt": "a"}\n', "it is a text file"),
        (b"\x80\x02}q\x00.", "it is torn or damaged"),
    ],
)  # fmt: skip
def test_something_else_is_named(tmp_path, content, reason):
    (tmp_path / "x.ckpt").write_bytes(content)
    assert reason in refusal(tmp_path / "x.ckpt")


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    assert "it is a folder" in refusal(tmp_path)
    assert "it does not exist" in refusal(tmp_path / "nowhere.ckpt")


def test_a_checkpoint_in_parts_is_refused_like_any_folder(tmp_path):
    (tmp_path / "meta.pt").touch()
    with pytest.raises(ValueError, match="--ckpt_path: expected a checkpoint, .*it is a folder"):
        read(tmp_path, "--ckpt_path")


def test_wherever_it_is_torn(file):
    whole = file.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        file.write_bytes(whole[: int(len(whole) * share)])
        refusal(file)


def test_a_flipped_bit_is_noticed_or_changes_nothing_that_is_read(file):
    whole, draw = file.read_bytes(), random.Random(0)
    noticed = 0
    torch.set_printoptions(profile="full")
    try:
        expected = repr(read_checkpoint(file, "--checkpoint"))
        for _ in range(200):
            bit = draw.randrange(8 * len(whole))
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            try:
                assert repr(read_checkpoint(file, "--checkpoint")) == expected, f"bit {bit}"
            except ValueError:
                noticed += 1
    finally:
        torch.set_printoptions(profile="default")
    # The rest fell between the parts: a file this small is mostly padding.
    assert noticed > 100


def test_a_pickle_runs_nothing(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "x.ckpt"
    torch.save(contents(hyper_parameters={"a": Payload(marker)}), path)
    assert "something other than tensors" in refusal(path)
    path.write_bytes(pickle.dumps(Payload(marker)))
    refusal(path)
    assert not marker.exists()


def test_a_part_that_unfolds_is_not_unfolded(tmp_path):
    path, inner = tmp_path / "x.ckpt", io.BytesIO()
    torch.save(contents(), inner)
    with zipfile.ZipFile(inner) as sound, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in sound.namelist():
            bomb.writestr(part, sound.read(part))
        bomb.writestr("archive/data/9", bytes(50_000_000))
    assert "not stored as `torch.save` stores them" in refusal(path)


def test_a_tensor_claims_no_more_than_the_file_holds(tmp_path):
    torch.save(contents(state_dict={"w": torch.ones(1).expand(10**12)}), tmp_path / "x.ckpt")
    assert "state_dict.w: expected all its values in the file" in refusal(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("replaced", "reason"),
    [
        ({"state_dict": {"w": torch.tensor([1.0, float("nan")])}}, "state_dict.w: expected finite weights"),
        ({"state_dict": {"w": torch.tensor(float("inf"))}}, "state_dict.w: expected finite weights"),
        ({"state_dict": {"w": 3}}, "state_dict.w: .*, got 3"),
        ({"state_dict": {"w": torch.ones(2).to_sparse()}}, "state_dict.w: expected an ordinary tensor"),
        ({"state_dict": {"w": torch.ones(2, device="meta")}}, "state_dict.w: expected an ordinary tensor"),
        ({"state_dict": None}, "state_dict: .*, got None"),
        ({"hyper_parameters": [1]}, r"hyper_parameters: .*, got \[1\]"),
        ({"lit_vapo_stage": 3}, "lit_vapo_stage: .*, got 3"),
        ({"lit_vapo_figures": {"a": "b"}}, "lit_vapo_figures.a: .*, got 'b'"),
        ({"pytorch-lightning_version": "abc"}, "pytorch-lightning_version: .*, got 'abc'"),
        ({"epoch": -1}, "epoch: .*, got -1"),
        ({"global_step": "3"}, "global_step: .*, got '3'"),
        ({"loops": []}, "loops: "),
        ({"optimizer_states": [3]}, "optimizer_states.0: "),
        ({7: 8}, "it does not hold a dict"),
    ],
)
def test_every_part_is_of_its_kind(tmp_path, replaced, reason):
    torch.save(contents(**{k: v for k, v in replaced.items() if isinstance(k, str)}) | replaced, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=reason):
        read_checkpoint(tmp_path / "x.ckpt", "--checkpoint")


@pytest.mark.parametrize(
    "missing", ["state_dict", "hyper_parameters", "pytorch-lightning_version", "epoch", "global_step"]
)
def test_no_part_is_missing(tmp_path, missing):
    torch.save({k: v for k, v in contents().items() if k != missing}, tmp_path / "x.ckpt")
    assert f"{missing}: expected this key, got none" in refusal(tmp_path / "x.ckpt")
