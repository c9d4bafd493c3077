"""A study of one's own preferences: who is learned from, who is judged on, and what people said."""

import json

import pytest
import torch

from examples.pairs.prepare import prepare
from lit_vapo.data.encoder import Encoder
from lit_vapo.models.pretrained import Pretrained
from lit_vapo.rewards.features import compute_features
from lit_vapo.rewards.reward_model import FeatureSpec
from lit_vapo.study.experiments.reference_responses import feature_model
from lit_vapo.study.experiments.responses import KnownResponses
from lit_vapo.types import Prompt


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(i, **more):
    return {"prompt": f"film {i}", "chosen": f" good {i}", "rejected": f" bad {i}"} | more


def test_half_of_the_prompts_are_judged_on_by_what_people_said(tmp_path, tiny_model_dir):
    rows = [pair(i, agreement=0.75) for i in range(30)] + [pair(i, tie=True) for i in range(30, 60)]
    file = write(tmp_path / "pairs.jsonl", rows)
    prepare(file, str(tiny_model_dir), str(tmp_path / "out"), layer=1)
    known = KnownResponses.load(tmp_path / "out" / "known")
    stated = known.true[:, 0] == 0.75
    torch.testing.assert_close(known.true[stated], torch.tensor([[0.75, 0.25]]).expand(int(stated.sum()), 2))
    torch.testing.assert_close(known.true[~stated], torch.full((int((~stated).sum()), 2), 0.5))
    # Of thirty that are no ties about half, and together all: a tie teaches nothing.
    assert 6 <= int(stated.sum()) <= 24
    assert len(known.chosen) + int(stated.sum()) == 30
    # Features are those of texts that no pair has twice, as an ensemble reads them.
    model = feature_model(FeatureSpec(Pretrained(str(tiny_model_dir)), pooling="mean", layer=1))
    encoder = Encoder(model.load_tokenizer())
    rows_of = []
    for side, index in (("chosen", 0), ("rejected", 1)):
        texts = [encoder.response(Prompt(row["prompt"]), row[side], ended=False) for row in rows]
        expected = compute_features(model, texts, torch.device("cpu"))
        found = torch.cat([getattr(known, side), known.responses[:, index]])
        nearest = torch.cdist(found, expected, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert nearest.values.max() < 1e-4
        rows_of.append(nearest.indices.tolist())
    # Both sides of a pair stand together, each pair once, the ties with the truth of ties.
    assert rows_of[0] == rows_of[1]
    assert len(set(rows_of[0])) == len(rows_of[0])
    judged = rows_of[0][len(known.chosen) :]
    assert known.true[:, 0].tolist() == [0.75 if row < 30 else 0.5 for row in judged]


def test_other_options_and_unusable_rows_are_refused(tmp_path, tiny_model_dir, capsys):
    good = [pair(i) for i in range(20)]
    file = write(tmp_path / "pairs.jsonl", [*good, {"prompt": "film", "chosen": 3, "rejected": " b"}])
    out, base = str(tmp_path / "out"), str(tiny_model_dir)
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 21: expected text or messages"):
        prepare(file, base, out)
    with pytest.warns(UserWarning, match="left out 1 of 21 rows"):
        prepare(file, base, out, skip_invalid=True)
    assert "pairs to learn from" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"output: .* was made with held_out 0\.5; expected another folder"):
        prepare(file, base, out, held_out=0.25, skip_invalid=True)
    # What was refused for its options can be made with right ones.
    file, out = write(tmp_path / "good.jsonl", good), str(tmp_path / "none")
    with pytest.raises(ValueError, match=r"held_out: expected a share that sets a pair aside, got 0"):
        prepare(file, base, out, held_out=0.0)
    prepare(file, base, out, held_out=0.25)
    assert 1 <= len(KnownResponses.load(tmp_path / "none" / "known").true) <= 9


def test_pairs_that_do_not_count_judge_nobody(tmp_path, tiny_model_dir):
    file = write(tmp_path / "pairs.jsonl", [pair(i, weight=i % 2) for i in range(40)])
    prepare(file, str(tiny_model_dir), str(tmp_path / "out"))
    known = KnownResponses.load(tmp_path / "out" / "known")
    assert len(known.chosen) + len(known.true) == 20
