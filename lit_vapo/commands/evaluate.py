"""`lit-vapo reward evaluate`: any source of rewards, tested on preference pairs."""

from __future__ import annotations

import torch

from lit_vapo.commands.sources import check_tokens, chosen_source, device_of, pair_responses, ready
from lit_vapo.data.collate import pair_labels
from lit_vapo.data.datamodule import PreferenceDataModule
from lit_vapo.evaluation.preference_files import write_report
from lit_vapo.evaluation.preference_record import tested
from lit_vapo.evaluation.preference_report import PreferenceReport
from lit_vapo.figures import preference_pictures
from lit_vapo.folders import check_new, new_folder
from lit_vapo.functional import margin_estimate
from lit_vapo.metrics import PreferenceMetrics
from lit_vapo.rewards import RewardSource
from lit_vapo.rollout import Encoders
from lit_vapo.types import RewardEstimate


def evaluate(
    output: str,
    data: PreferenceDataModule,
    reward: RewardSource | str | None = None,
    ensemble: str | None = None,
    trust: list[str] | None = None,
) -> None:
    """Test a source of rewards on preference pairs: is it right, does its σ tell its errors, what does it look at.

    Writes the files of `lit-vapo reward test`: `evaluation.json`, `evaluation.csv`, `pairs.csv`, and pictures. Margins
    are those that PPO sees: differences of normalised rewards, in standard deviations over the reference's responses
    rather than in log-odds. Accuracy, AUROC and the risk–coverage curve do not depend on that. NLL, ECE and Brier score
    do: read those after a temperature (`temperature` in `evaluation.json`), which is fitted on the validation pairs.

    Args:
        output: A new or empty folder.
        data: Preferences, as in the reward stage; `preferences_test` is tested on, or what `test_fraction` sets aside.
        reward: Folder of an ensemble or of public reward models, or a source of rewards.
        ensemble: Another name of `reward`, for a folder.
        trust: Code outside of lit_vapo that the folder may run: classes by their Python name, models that bring code by
            folder or hub name.

    Raises:
        ValueError: There are no pairs to test on, the source has no separate members, or a reward is not finite.
        FileExistsError: The output has files in it.
    """
    check_new(output, "--output")
    source = chosen_source(reward, ensemble, trust)
    data.keep_texts()
    if not data.preference_rows("test"):
        raise ValueError("data.preferences_test: expected pairs to test on (or a part set aside), got none")
    source = ready(source, device_of())
    check_tokens(source, data)
    encoders = Encoders()
    reports = {split: _report(source, data, split, encoders) for split in data.test_splits()}
    report = reports["test"]
    if not report.num_pairs:
        raise ValueError("data.preferences_test: expected pairs that are not all ties, got none")
    record = tested(reports, data.preference_rows("test"), None, source.calibrated) | {"margin_unit": source.unit}
    with new_folder(output, "--output") as target:
        write_report(target, report, record)
        preference_pictures(report, target, source.unit, reports.get("ood"))
    print(f"What the test pairs say of these rewards ({source.unit}; files in {output}):")
    for sentence in record["verdict"]["sentences"]:
        print(f"  {sentence}")


@torch.no_grad()
def _report(source: RewardSource, data: PreferenceDataModule, split: str, encoders: Encoders) -> PreferenceReport:
    """The evaluation of a split, scored `data.batch_size` pairs at a time."""
    metric, rows = PreferenceMetrics(), data.preference_rows(split)
    for start in range(0, len(rows), data.batch_size):
        chosen_rows = rows[start : start + data.batch_size]
        estimate = source.score(pair_responses(data, chosen_rows, encoders, device_of()))
        if bool(estimate.missing.any()):
            row = int(estimate.missing.nonzero()[0, 0])
            got = float(estimate.mean[row]) if estimate.applies is None or bool(estimate.applies[row]) else "none"
            raise ValueError(f"{chosen_rows[row % len(chosen_rows)]['place']}: expected a finite score, got {got}")
        members = _members(source, estimate)
        chosen, rejected = (RewardEstimate(*x) for x in zip(*(y.cpu().chunk(2) for y in members), strict=True))
        assert chosen.members is not None
        assert rejected.members is not None
        margin = margin_estimate(chosen.members, rejected.members)
        metric.update(margin, chosen, rejected, pair_labels(chosen_rows))
    report: PreferenceReport = metric.compute()
    return report


def _members(source: RewardSource, estimate: RewardEstimate) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (B,), variance (B,) and members (B, K); the only member is the mean."""
    if source.num_members == 1:
        return estimate.mean, torch.zeros_like(estimate.mean), estimate.mean[:, None]
    if estimate.members is None:
        raise ValueError(
            f"--reward: expected separate members, without which a margin has no variance, got {type(source).__name__}"
        )
    return estimate.mean, estimate.variance, estimate.members
