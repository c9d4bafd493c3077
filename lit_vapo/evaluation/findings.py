"""Whether to trust what a run of PPO says of itself: rules that make a sentence of a figure.

docs/reports.md lists them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lit_vapo.functional.intervals import NORMAL_95

Level = Literal["good", "look", "bad"]
Row = Mapping[str, Any]

# Nats per response above which a policy is far away, and so far that little of the reference is left.
FAR, VERY_FAR = 10.0, 30.0
# Growth of σ from the reference's responses to the policy's.
MORE_DOUBT, MUCH_MORE_DOUBT = 1.25, 2.0
# As near as two means are that are the same but for rounding.
SAME = 1e-5
# How much longer or shorter responses may become, and what may be lost of their distinct pairs of words.
OTHER_LENGTH, LOST_WORDS = 1.5, 0.2
# Share of responses that end by themselves from which on its fall says anything.
SOME_END = 0.1
# Of the ratio of the policy to itself, which is 1 but for rounding.
ROUNDING = 1e-3


class Finding(NamedTuple):
    """What a figure comes to.

    Attributes:
        level: `good`, `look` (at it), or `bad`.
        text: A sentence with the figure.
    """

    level: Level
    text: str


def policy_findings(
    course: Sequence[Row], first_ratios: Sequence[float] = (), test: Sequence[Row] = ()
) -> list[Finding]:
    """What the evaluations of a run come to.

    Args:
        course: Rows of `evaluations.csv`, the reference's first.
        first_ratios: Mean ratio of each iteration's first minibatch, before any update.
        test: Figures of reference and policy on the test prompts; empty for the last row of `course`.
    """
    judged = test or course
    if len(judged) < 2:
        return [Finding("look", "No policy was evaluated on prompts that were set aside: nothing is known of a gain.")]
    before, after = judged[0], judged[-1]
    where = "test prompts" if test else "validation prompts"
    found = [*_gain(after, where), *_gold(after, where), *_over_optimised(course), *_distance(after)]
    found += [*_doubt(before, after), *_members(before, after)]
    found += [*_length(before, after), *_words(before, after), *_ratio(first_ratios)]
    return found


def verdict_findings(sentences: Sequence[str]) -> list[Finding]:
    """The sentences of an ensemble's verdict; advice stands behind what it is about."""
    found: list[Finding] = []
    for text in sentences:
        if text.startswith("WARNING: "):
            said = text.removeprefix("WARNING: ")
            # σ stays small.
            found.append(Finding("bad", (said[0].upper() if said[0].isascii() else said[0]) + said[1:]))
        elif found and text.startswith(("Try ", "Expect ")):
            found[-1] = found[-1]._replace(text=f"{found[-1].text} {text}")
        else:
            found.append(Finding("look" if "too few" in text else "good", text))
    return found


def _known(row: Row, name: str) -> float | None:
    value = row.get(name)
    return None if value is None or math.isnan(value) else float(value)


def _risen(row: Row, where: str, name: str, good: str, bad: str, unclear: str) -> Iterator[Finding]:
    gain, error = _known(row, f"{name}_gain"), _known(row, f"{name}_gain_se")
    if gain is None or error is None:
        return
    low, high = gain - NORMAL_95 * error, gain + NORMAL_95 * error
    seen = f"{gain:+.3g} on {where} (95% interval {low:+.3g} to {high:+.3g})"
    if low > 0:
        yield Finding("good", f"{good}: {seen}.")
    elif high < 0:
        yield Finding("bad", f"{bad}: {seen}.")
    else:
        yield Finding("look", f"{unclear}: {seen}.")


def _gain(after: Row, where: str) -> Iterator[Finding]:
    yield from _risen(
        after,
        where,
        "reward",
        "The ensemble prefers the policy to the reference",
        "The ensemble prefers the reference to the policy",
        "The ensemble is not shown to prefer the policy",
    )


def _gold(after: Row, where: str) -> Iterator[Finding]:
    if _known(after, "gold_gain") is None:
        yield Finding(
            "look",
            "Nobody but the ensemble judged the policy. Some of its gain may be the ensemble's error: read the "
            "responses below, or give a judge that training never sees (model.gold).",
        )
        return
    yield from _risen(
        after,
        where,
        "gold",
        "A judge that training never saw agrees",
        "A judge that training never saw likes the policy less than the reference: the policy learned errors of the "
        "ensemble. Use a larger model.kl_coef, or an earlier checkpoint",
        "A judge that training never saw does not tell them apart",
    )


def _over_optimised(course: Sequence[Row]) -> Iterator[Finding]:
    if len(course) < 2 or _known(course[-1], "gold_gain") is None:
        return
    after = course[-1]
    judged = [row for row in course[1:] if _known(row, "gold_gain") is not None]
    best = max(judged, key=lambda row: float(row["gold_gain"]))
    lost = float(best["gold_gain"]) - float(after["gold_gain"])
    if lost > NORMAL_95 * (_known(after, "gold_gain_se") or math.inf):
        yield Finding(
            "bad",
            f"Gold on validation prompts was {lost:.3g} higher at iteration {best['iteration']}: after it, the policy "
            "was over-optimised. model.kl_budget or model.kl_target ends a run earlier.",
        )


def _distance(after: Row) -> Iterator[Finding]:
    kl = _known(after, "kl_k3")
    if kl is None:
        return
    seen = f"a KL of {kl:.3g} nats per response (k3)"
    if kl <= FAR:
        yield Finding("good", f"The policy is {seen} away from the reference.")
    elif kl <= VERY_FAR:
        yield Finding("look", f"The policy is far from the reference, {seen}.")
    else:
        yield Finding("bad", f"The KL has run away: {seen}. Use a larger model.kl_coef, or model.kl_target.")


def _doubt(before: Row, after: Row) -> Iterator[Finding]:
    then, now = _known(before, "ensemble_sigma"), _known(after, "ensemble_sigma")
    if not then or now is None:
        return
    if math.isclose(now, then, rel_tol=SAME):
        # Means over other responses; only constants are as near.
        yield Finding(
            "look",
            f"σ is {now:.3g} for every response: members differ from response to response no more than by chance, so "
            "their disagreement steers nothing. Try more members, or another estimator.",
        )
        return
    seen = f"σ is {now / then:.2f} times as large on the policy's responses as on the reference's"
    if now <= MORE_DOUBT * then:
        yield Finding("good", f"Members agree about the policy as they did about the reference: {seen}.")
    elif now <= MUCH_MORE_DOUBT * then:
        yield Finding("look", f"Members disagree more about the policy: {seen}.")
    else:
        yield Finding("bad", f"Members part: {seen}. The policy is where the ensemble knows little.")


def _members(before: Row, after: Row) -> Iterator[Finding]:
    names = [name for name in after if name.startswith("reward_member_")]
    risen = sum(float(after[name]) > float(before[name]) for name in names)
    fallen = sum(float(after[name]) < float(before[name]) for name in names)
    if len(names) < 2 or not risen + fallen:
        return
    level: Level = "good" if risen == len(names) else "look" if risen > fallen else "bad"
    yield Finding(level, f"{risen} of {len(names)} members that are logged see a gain.")


def _length(before: Row, after: Row) -> Iterator[Finding]:
    then, now = _known(before, "response_length"), _known(after, "response_length")
    if then and now is not None and not 1 / OTHER_LENGTH <= now / then <= OTHER_LENGTH:
        yield Finding("look", f"Responses went from {then:.0f} to {now:.0f} tokens: length may be what was learned.")
    ended, ends = _known(before, "eos_rate"), _known(after, "eos_rate")
    if ended and ended >= SOME_END and ends is not None and ends < ended / 2:
        yield Finding("look", f"{ends:.0%} of responses end by themselves, and {ended:.0%} of the reference's.")


def _words(before: Row, after: Row) -> Iterator[Finding]:
    then, now = _known(before, "distinct_pairs"), _known(after, "distinct_pairs")
    if then and now is not None and now < (1 - LOST_WORDS) * then:
        level: Level = "bad" if now < then / 2 else "look"
        yield Finding(level, f"Responses repeat: of pairs of words, {now:.0%} are distinct, {then:.0%} before.")


def _ratio(first_ratios: Sequence[float]) -> Iterator[Finding]:
    known = [ratio for ratio in first_ratios if not math.isnan(ratio)]
    if not known:
        return
    worst = max(known, key=lambda ratio: abs(ratio - 1))
    if abs(worst - 1) <= ROUNDING:
        yield Finding("good", "Rollout and update compute the same probabilities: the first ratio was 1 throughout.")
    else:
        yield Finding("bad", f"Rollout and update compute different probabilities: a first ratio was {worst:.4f}.")
