"""Nothing is written outside, nothing damaged is read, and nothing takes more than it brings."""

import json
import os
import random
import shutil
import stat
import struct
import time

import pytest
import torch
from hostile_helpers import edit, ensemble, head, refused
from safetensors.torch import save_file

from lit_vapo.commands.ensembles import join
from lit_vapo.models.digests import check_sealed, copy_sealed, seal
from lit_vapo.rewards.ensemble_file import read_config
from lit_vapo.rewards.features import load_features, save_features
from lit_vapo.rewards.reward_model import RewardModel


@pytest.fixture(scope="module")
def sound(tiny_model_dir, tmp_path_factory):
    """An ensemble that nobody changes."""
    return ensemble(tmp_path_factory.mktemp("sound") / "e", tiny_model_dir)


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of it to be changed."""
    return shutil.copytree(sound, tmp_path / "e")


def load(folder):
    """The head alone: no model is read."""
    return RewardModel.from_pretrained(folder, with_backbone=False)


# Nothing is written outside.

OUTSIDE = ["../escaped", "x/../../escaped", "/tmp/escaped", "a/./b", "", ".", "..", "a\\b", "a\0b", "a//b"]


@pytest.mark.parametrize("member", ["x/../../../escaped", "0", -1, 2, 1.0, True, None, [0], 10**30])
def test_members_are_numbers_of_members(folder, member):
    for members in ([0, member], [member]):
        edit(folder / "ensemble.json", members=members)
        refused(r"ensemble.json: members", read_config, folder)
    edit(folder / "ensemble.json", members=[0, 0])
    refused(r"members: expected different numbers 0 … 1, got \[0, 0\]", read_config, folder)


def test_join_writes_nothing_of_what_it_refuses(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    edit(other / "ensemble.json", members=[0, "x/../../../escaped"])
    before = sorted(p.name for p in tmp_path.iterdir())
    refused("members.1: expected a valid integer", join, [str(folder), str(other)], str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_digests_name_files_inside(folder, name):
    digests = json.loads((folder / "digests.json").read_text())
    digests["files"][name] = {"size": 0, "sha256": "0" * 64}
    (folder / "digests.json").write_text(json.dumps(digests))
    refused(r"digests.json: files.*: expected the name of a file inside", check_sealed, folder)


def test_links_that_lead_out_are_not_copied(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "head.safetensors").read_bytes())
    (folder / "head.safetensors").unlink()
    (folder / "head.safetensors").symlink_to(secret)
    refused("expected a file inside of the folder, got a link to", copy_sealed, folder, tmp_path / "out")
    (tmp_path / "hidden").mkdir()
    (folder / "member_0").symlink_to(tmp_path / "hidden")
    assert not (tmp_path / "out").exists()


def test_only_what_was_written_is_copied(folder, tmp_path):
    (folder / "extra.py").write_text("import os")
    copy_sealed(folder, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ensemble.json", "head.safetensors"]


def test_others_may_read_what_is_written(sound):
    umask = os.umask(0)
    os.umask(umask)
    for path in sound.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


# Damage is noticed.


def test_every_flipped_bit_of_an_ensemble_is_noticed(folder):
    draw = random.Random(0)
    for name in ("head.safetensors", "ensemble.json", "digests.json"):
        path, whole = folder / name, (folder / name).read_bytes()
        for _ in range(60):
            bit = draw.randrange(8 * len(whole))
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            refused(str(folder), load, folder)
        path.write_bytes(whole)
    load(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer of"),
        (b"\0" * 64, "it was changed or damaged"),
    ],
)
def test_what_was_put_in_place_of_weights_is_named(folder, content, reason):
    (folder / "head.safetensors").write_bytes(content)
    message = refused(f"head.safetensors: expected the .* bytes that were written, .*{reason}", load, folder)
    assert "lit_vapo.models.digests.seal" in message


def test_a_folder_without_digests_is_no_ensemble(folder):
    (folder / "digests.json").unlink()
    refused("expected digests.json, which is written with every ensemble, got none", load, folder)
    check_sealed(folder, required=False)


def test_a_feature_cache_is_read_as_it_was_written(tmp_path):
    features = torch.randn(5, 4)
    save_features(tmp_path, "key", features)
    torch.testing.assert_close(load_features(tmp_path, "key"), features, rtol=0, atol=0)
    assert load_features(tmp_path, "other") is None
    path, whole, draw = tmp_path / "key.safetensors", (tmp_path / "key.safetensors").read_bytes(), random.Random(0)
    for content in (b"", whole[:-1], whole[:9]):
        path.write_bytes(content)
        refused("key.safetensors: expected tensors", load_features, tmp_path, "key")
    for _ in range(60):
        bit = draw.randrange(64, 8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        refused("key.safetensors: expected", load_features, tmp_path, "key")
    save_file({"features": features}, path)
    refused("It is a cache: remove it", load_features, tmp_path, "key")


# What is sealed by somebody else is still checked.


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"hidden_size": 64}, "head.safetensors: expected weight of shape .2, 64., got .2, 32."),
        ({"hidden_size": 10**7}, "hidden_size: expected less than or equal to 1000000, got 10000000"),
        ({"hidden_size": 32.5}, "hidden_size: "),
        ({"hidden_size": "32"}, "hidden_size: expected a valid integer, got '32'"),
        ({"num_members": 10**9}, "num_members: expected less than or equal to 10000"),
        ({"num_members": 3}, "expected reward_loc of shape .3,., got .2,."),
        ({"num_members": float("nan")}, "num_members: "),
        ({"head__init_args__num_members": 10_000_000}, "head.num_members: expected 2, as outside of it, got 10000000"),
        ({"head__init_args__num_members": 0}, "ensemble.json: head.init_args.num_members: expected at least 1, got 0"),
        ({"head__init_args__hidden_width": 10**9}, "expected .* of shape"),
        ({"head__init_args__hidden_width": -3}, "ensemble.json: head"),
        ({"head__init_args__label_smoothing": float("nan")}, "head.init_args.label_smoothing: "),
        ({"head__init_args__other": 1}, "head.init_args.other: expected no such key"),
        ({"head__init_args__bootstrap": "yes"}, "head.init_args.bootstrap: expected a valid boolean, got 'yes'"),
        (
            {"head__class_path": "lit_vapo.rewards.members.heads.Nothing"},
            "expected a class that can be",
        ),
        ({"head__class_path": "lit_vapo.objectives.mean_reward.MeanReward"}, "class_path: expected a subclass of Rew"),
        (
            {"head__class_path": "lit_vapo.rewards.members.dropout.McDropout"},
            "bootstrap: expected no such key",
        ),
        ({"spec__pooling": "max"}, "spec.pooling: expected 'last' or 'mean', got 'max'"),
        ({"spec__layer": 0}, "spec.layer: expected 1 or more, or null, got 0"),
        ({"spec__base__path": None}, "spec.base.path: expected a valid string, got None"),
        ({"spec__base__dtype": "float8"}, "spec.base.dtype: expected 'auto'"),
        ({"spec__base__odd": 1}, "spec.base.odd: expected no such key"),
        ({"own_backbone": 1}, "own_backbone: expected a valid boolean, got 1"),
        ({"odd": 1}, "odd: expected no such key"),
    ],
)
def test_every_key_is_what_it_should_be(folder, values, reason):
    edit(folder / "ensemble.json", **values)
    started = time.monotonic()
    refused(reason, load, folder)
    assert time.monotonic() - started < 5


TEXTS = ["", "{", "[]", "null", "[" * 100_000, '{"a": ' * 5_000, '{"spec": "\\ud800"}', "\0", "NaN"]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_is_no_json_is_refused(folder, text):
    (folder / "ensemble.json").write_text(text)
    seal(folder)
    refused("ensemble.json: ", load, folder)


def test_no_key_is_missing(folder):
    config = json.loads((folder / "ensemble.json").read_text())
    for key in config:
        if key != "format_version":
            (folder / "ensemble.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
            refused(f"ensemble.json: {key}: expected this key, got none", load, folder)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("weight", float("nan"), "expected weight to be finite and at most 1e.06, got nan"),
        ("weight", float("inf"), "expected weight to be finite"),
        ("weight", 1e30, "expected weight to be finite and at most"),
        ("reward_loc", 1e9, "expected reward_loc to be finite and at most"),
        ("reward_scale", 0.0, "expected reward_scale above 0, got 0.0"),
        ("reward_scale", -1.0, "expected reward_scale above 0, got -1.0"),
        ("reference_variance", -1.0, "expected reference_variance above 0, got -1.0"),
        ("reference_variance", float("nan"), "expected reference_variance to be finite"),
        ("typical_variance", -1.0, "expected typical_variance of at least 0, got -1.0"),
        ("shrinkage", 1.5, r"expected shrinkage in \[0, 1\], got 1.5"),
    ],
)
def test_a_weight_that_makes_no_sense_is_refused(folder, name, value, reason):
    weights = {k: v.clone() for k, v in head().state_dict().items()}
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "head.safetensors")
    seal(folder)
    refused(f"head.safetensors: {reason}", load, folder)


@pytest.mark.parametrize("change", ["missing", "more", "double", "shape", "flat"])
def test_the_head_has_its_weights_and_no_others(folder, change):
    weights = dict(head().state_dict())
    weights |= {
        "missing": {},
        "more": {"odd": torch.ones(2)},
        "double": {"weight": weights["weight"].double()},
        "shape": {"weight": weights["weight"].T.contiguous()},
        "flat": {"weight": weights["weight"].flatten()},
    }[change]
    if change == "missing":
        del weights["bias"]
    save_file(weights, folder / "head.safetensors")
    seal(folder)
    refused("head.safetensors: expected (bias|odd|weight) ", load, folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}},
        {"weight": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}},
        {"weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"weight": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"weight": 3},
    ],
)
def test_a_header_claims_no_more_than_the_file_holds(folder, tensors):
    header = json.dumps(tensors).encode()
    (folder / "head.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    seal(folder)
    refused("head.safetensors: expected tensors .*, got a file that cannot be read", load, folder)
    (folder / "head.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"\0" * 8)
    seal(folder)
    refused("head.safetensors: expected tensors .*, got a file that cannot be read", load, folder)


def test_a_pickle_by_another_name_is_refused(folder, tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    (folder / "head.safetensors").write_bytes(pickle.dumps(Payload()))
    seal(folder)
    refused("head.safetensors: expected tensors", load, folder)
    assert not (tmp_path / "marker").exists()
