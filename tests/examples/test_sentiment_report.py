import json
import re

import numpy as np
import pytest

from examples.sentiment.report import report, summarise

COLUMNS = ("iteration", "gold", "reward_mean", "ensemble_sigma", "kl_k1", "kl_weighted_k3")


@pytest.fixture
def demo(tmp_path):
    """The files of a finished demo, tiny and made up."""
    rng = np.random.default_rng(0)
    for folder in ("ppo/logs/version_0", "ppo/logs/version_1", "ppo/test", "reward", "judge"):
        (tmp_path / folder).mkdir(parents=True)
    lines = ["epoch,step," + ",".join(f"train/{name}" for name in COLUMNS)]
    lines += [f"0,{i},{i + 1}," + ",".join(f"{x:.3f}" for x in rng.random(len(COLUMNS) - 1)) for i in range(8)]
    (tmp_path / "ppo/logs/version_0/metrics.csv").write_text("\n".join(lines) + "\n")
    # A test leaves a log of its own, which has no training to show.
    (tmp_path / "ppo/logs/version_1/metrics.csv").write_text("epoch,step,test/gold\n0,8,0.7\n")
    records = []
    for who, shift in (("reference", 0.0), ("policy", 0.4)):
        for i in range(12):
            members = rng.normal(shift, 1, size=3)
            record = {"policy": who, "prompt": f"Review: film {i} <b>", "response": f" was & is {who} {i}"}
            record |= {"members": members.tolist(), "reward": members.mean(), "sigma": members.std(ddof=1)}
            records.append(record | {"kl": 3 * shift, "kl_weight": 1.0, "gold": 0.3 + shift})
    (tmp_path / "ppo/test/responses.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    member = {"accuracy": 0.75, "nll": 0.5, "ece": 0.02}
    evaluation = {"mean": member, "members": [member] * 3, "num_pairs": 40}
    (tmp_path / "reward/test").mkdir(parents=True)
    (tmp_path / "reward/test/evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "judge/quality.json").write_text(json.dumps({**member, "sentences": 50}))
    return tmp_path


def test_the_report_stands_alone(demo, capsys):
    report(str(demo))

    html = (demo / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|https?://|<link|src=\"(?!data:)", html)
    assert "film 3 &lt;b&gt; …" in html
    assert "was &amp; is policy 3" in html
    assert "film 10" not in html  # ten prompts are shown, 0 to 9
    assert len(list((demo / "figures").glob("*.png"))) >= 3
    assert "0.700" in capsys.readouterr().out
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["gold_gain"] == pytest.approx(0.4)
    assert summary["judge"]["sentences"] == 50


def test_a_missing_stage_is_named(demo):
    (demo / "ppo/test/responses.jsonl").unlink()

    with pytest.raises(ValueError, match=r"responses\.jsonl: run `lit-vapo ppo test` first"):
        report(str(demo))


def test_summary_by_hand():
    # Gains 0.4 and -0.1: mean 0.15; with two prompts the resampled mean is -0.1, 0.15 or 0.4.
    # Log ratios 0 and ln 2: k1 = ln 2 / 2, k3 = (0 + (1/2 - 1 + ln 2)) / 2.
    rest = {"reward": 0.0, "sigma": 0.1, "response": "a b"}
    before = [{**rest, "gold": 0.2, "kl": 0.0}, {**rest, "gold": 0.6, "kl": 0.0}]
    after = [{**rest, "gold": 0.6, "kl": 0.0}, {**rest, "gold": 0.5, "kl": np.log(2)}]

    summary = summarise(before, after, {}, {})

    assert summary["gold_gain"] == pytest.approx(0.15)
    assert summary["gold_gain_95"] == pytest.approx([-0.1, 0.4])
    assert summary["sequence_kl_k1"] == pytest.approx(np.log(2) / 2)
    assert summary["sequence_kl_k3"] == pytest.approx((np.log(2) - 0.5) / 2)
