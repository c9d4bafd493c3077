"""Every picture is drawn, of ordinary and of extreme reports, and leaves nothing global behind."""

import math

import matplotlib as mpl
import matplotlib.image
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.axes import Axes

from lit_vapo import figures
from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.functional import ensemble_estimate
from lit_vapo.types import RewardEstimate


def report_of(members):
    return PreferenceReport(torch.arange(len(members)), ensemble_estimate(members), torch.rand(len(members), 2))


REPORTS = {
    "ordinary": lambda: report_of(torch.randn(60, 3) + 1),
    "one member": lambda: report_of(torch.randn(60, 1)),
    "one pair": lambda: report_of(torch.ones(1, 3)),
    "no errors": lambda: report_of(torch.rand(20, 3) + 9),
    "no members": lambda: PreferenceReport(
        torch.arange(9), RewardEstimate(torch.randn(9), torch.rand(9), None), torch.rand(9, 2)
    ),
}


def is_drawn(path):
    """Whether the file is a PNG of some size on which more than the paper is seen."""
    pixels = matplotlib.image.imread(path)
    return pixels.shape[0] > 200 and pixels.shape[1] > 200 and pixels[..., :3].std() > 0.01


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("draw", [figures.reliability, figures.risk_coverage])
def test_reports_are_drawn(tmp_path, name, draw):
    path = tmp_path / "new" / "picture.png"
    before = dict(mpl.rcParams)
    draw(REPORTS[name](), path)
    assert is_drawn(path)
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_empty_reports_are_refused(tmp_path):
    empty = REPORTS["ordinary"]().select(torch.zeros(60, dtype=torch.bool))
    for draw in (figures.reliability, figures.risk_coverage):
        with pytest.raises(ValueError, match="expected a report of at least one pair, got an empty one"):
            draw(empty, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("sigma", [torch.rand(50), torch.zeros(50), torch.ones(1)])
@pytest.mark.parametrize("other", [None, torch.rand(9) * 2])
def test_sigma_is_drawn(tmp_path, sigma, other):
    figures.sigma_histogram(sigma, tmp_path / "sigma.png", other=other)
    assert is_drawn(tmp_path / "sigma.png")


def test_a_second_data_set_has_a_colour_of_its_own(tmp_path):
    def orange(path):
        red, green, blue = matplotlib.image.imread(path)[..., :3].transpose(2, 0, 1)
        return ((red - blue > 0.2) & (red > green)).mean()

    figures.sigma_histogram(torch.rand(50), tmp_path / "one.png")
    figures.sigma_histogram(torch.rand(50), tmp_path / "two.png", other=torch.rand(50) + 0.5)
    assert orange(tmp_path / "one.png") == 0
    assert orange(tmp_path / "two.png") > 0.05


@pytest.mark.parametrize("members", [1, 5])
def test_member_scores_are_drawn_whatever_the_text(tmp_path, members):
    texts = [r"costs $\x$", "a_b^c {x}", "", "line\nbreak", "very " * 99]
    figures.member_scores(torch.randn(5, members), texts, tmp_path / "scores.png")
    assert is_drawn(tmp_path / "scores.png")


def test_bad_arguments_are_refused(tmp_path):
    path = tmp_path / "picture.png"
    with pytest.raises(ValueError, match=r"expected σ of shape \(N,\) with N >= 1 for elsewhere, got \(0,\)"):
        figures.sigma_histogram(torch.rand(3), path, other=torch.zeros(0), names=("here", "elsewhere"))
    with pytest.raises(ValueError, match=r"expected scores of shape \(N, K\) with N, K >= 1, got \(3,\)"):
        figures.member_scores(torch.zeros(3), [""] * 3, path)
    with pytest.raises(ValueError, match="expected labels of 3 responses, got 1"):
        figures.member_scores(torch.zeros(3, 2), [""], path)
    assert not path.exists()


def course(count, **other):
    """Evaluations of a policy that moves one nat at a time, the reference's first."""
    return [
        {"policy": "policy" if i else "reference", "iteration": i, "kl_k1": float(i), "reward_mean": 0.5 * i,
         "reward_std": 1.0, "reward_member_0": 0.2 * i, "reward_member_1": 0.8 * i, "gold": 0.5 + 0.01 * i,
         "gold_std": 0.1, **({"reward_gain_se": 0.1, "gold_gain_se": 0.02} if i else {}), **other}
        for i in range(count + 1)
    ]  # fmt: skip


NOBODY = {"gold": math.nan, "gold_std": math.nan}
BEST = {"n": [1, 2], "kl_bound": [0.0, 0.19], "reward": [0.0, 0.6], "gold": [0.5, 0.53]}


@pytest.mark.parametrize(
    "arguments",
    [
        (course(1),),
        (course(30),),
        (course(3, **NOBODY),),
        (course(2, reward_std=0.0, gold_std=0.0, kl_k1=-0.1),),
        ([], course(1)),
        ([], course(1, **NOBODY), {name: BEST[name] for name in ("n", "kl_bound", "reward")}),
        (course(4), course(1), BEST),
        (course(4, outlier_share=0.02, relative_sigma=1.1),),
        (course(4, outlier_share=0.0),),
    ],
    ids=["one", "many", "no judge", "no spread", "test alone", "no judge in the test", "all", "alarm", "no σ"],
)
def test_courses_are_drawn(tmp_path, arguments):
    figures.overoptimisation(tmp_path / "course.png", *arguments)
    assert is_drawn(tmp_path / "course.png")


def test_gains_are_in_deviations_of_the_reference(tmp_path, monkeypatch):
    drawn = []

    def watch(self, *args, **kwargs):
        drawn.append(args)
        return self.plot([0], [0])[0]

    for name in ("errorbar", "fill_between"):
        monkeypatch.setattr(Axes, name, watch)
    figures.overoptimisation(tmp_path / "course.png", course(4, reward_std=2.0))
    (x, y, error), (_, low, high), (_, gold, _) = drawn
    assert x == pytest.approx([0, 1, 2**0.5, 3**0.5, 2])
    assert y == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert error == pytest.approx([0] + [0.05] * 4)
    assert low[-1] == pytest.approx(0.4)
    assert high[-1] == pytest.approx(1.6)
    assert gold[-1] == pytest.approx(0.4)


def test_outliers_are_drawn_below_the_gains(tmp_path, monkeypatch):
    drawn = {}
    plot = Axes.plot

    def watch(self, x, y, *args, **kwargs):
        drawn[kwargs.get("label")] = list(y)
        return plot(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", watch)
    rows = [{**row, "outlier_share": 0.01 * (i + 1), "relative_sigma": 1.0 + i} for i, row in enumerate(course(2))]
    figures.overoptimisation(tmp_path / "course.png", rows)
    assert drawn["unlike the reference's"] == pytest.approx([1.0, 2.0, 3.0])
    assert drawn["members' disagreement"] == pytest.approx([1.0, 2.0, 3.0])


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected evaluations to draw, got none"):
        figures.overoptimisation(tmp_path / "course.png", [])
