"""`lit-vapo report`: a page about a run, and the rules of its sentences."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import yaml

from lit_vapo.cli import main
from lit_vapo.commands.endings import write_page
from lit_vapo.commands.report import page, read_run
from lit_vapo.commands.run_folder import replaced_by_run
from lit_vapo.evaluation.findings import policy_findings, verdict_findings

REFERENCE = {
    "policy": "reference",
    "iteration": 0,
    "reward_mean": 0.0,
    "ensemble_sigma": 0.5,
    "response_length": 20.0,
    "eos_rate": 0.8,
    "distinct_pairs": 0.9,
    "reward_member_0": 0.0,
    "reward_member_1": 0.0,
}
POLICY = REFERENCE | {
    "policy": "policy",
    "iteration": 9,
    "reward_gain": 0.5,
    "reward_gain_se": 0.1,
    "ensemble_sigma": 0.55,
    "gold_gain": 0.3,
    "gold_gain_se": 0.1,
    "kl_k3": 4.0,
    "reward_member_0": 0.5,
    "reward_member_1": 0.4,
}


def test_a_healthy_run_has_nothing_to_look_at():
    found = policy_findings([REFERENCE, POLICY], [1.0, 1.0000002])
    assert {finding.level for finding in found} == {"good"}
    assert len(found) == 6


@pytest.mark.parametrize(
    ("changed", "level", "said"),
    [
        (
            {"reward_gain": 0.1},
            "look",
            "not shown to prefer the policy: +0.1 on validation prompts (95% interval -0",
        ),
        ({"reward_gain": -0.5}, "bad", "prefers the reference to the policy"),
        ({"gold_gain": -0.3}, "bad", "learned errors of the ensemble"),
        ({"gold_gain": 0.0}, "look", "does not tell them apart"),
        ({"gold_gain": float("nan")}, "look", "Nobody but the ensemble judged"),
        ({"kl_k3": 10.5}, "look", "far from the reference, a KL of 10.5"),
        ({"kl_k3": 31.0}, "bad", "The KL has run away"),
        ({"ensemble_sigma": 0.500001}, "look", "σ is 0.5 for every response"),
        ({"ensemble_sigma": 0.8}, "look", "1.60 times as large"),
        ({"ensemble_sigma": 1.5}, "bad", "Members part"),
        ({"reward_member_1": -0.1}, "bad", "1 of 2 members"),
        ({"response_length": 31.0}, "look", "from 20 to 31 tokens"),
        ({"eos_rate": 0.3}, "look", "30% of responses end by themselves"),
        ({"distinct_pairs": 0.7}, "look", "70% are distinct, 90% before"),
        ({"distinct_pairs": 0.4}, "bad", "Responses repeat"),
    ],
)
def test_what_is_wrong_is_the_one_thing_that_is_told(changed, level, said):
    found = [finding for finding in policy_findings([REFERENCE, POLICY | changed]) if finding.level != "good"]
    assert [finding.level for finding in found] == [level]
    assert said in found[0].text


def test_where_hardly_any_response_ends_fewer_ends_say_nothing():
    short = {"eos_rate": 0.01}, {"eos_rate": 0.0}
    assert all(x.level == "good" for x in policy_findings([REFERENCE | short[0], POLICY | short[1]]))


def test_a_ratio_that_is_not_one_is_told():
    assert policy_findings([REFERENCE, POLICY], [1.0, 0.98])[-1].text.endswith("a first ratio was 0.9800.")
    assert policy_findings([REFERENCE, POLICY], [float("nan")]) == policy_findings([REFERENCE, POLICY])


def test_who_was_better_before_is_told():
    best = POLICY | {"iteration": 4, "gold_gain": 0.6}
    found = [finding for finding in policy_findings([REFERENCE, best, POLICY]) if finding.level == "bad"]
    assert len(found) == 1
    assert found[0].text.startswith("Gold on validation prompts was 0.3 higher at iteration 4")
    assert "over-optimised" not in str(policy_findings([REFERENCE, POLICY | {"gold_gain": 0.45}, POLICY]))
    # A gain of nothing is a gain, and iterations that nobody judged are none.
    course = [POLICY | {"iteration": i, "gold_gain": x} for i, x in enumerate([0.0, float("nan"), -0.5], start=1)]
    assert "was 0.5 higher at iteration 1" in str(policy_findings([REFERENCE, *course]))


def test_a_test_is_judged_in_place_of_the_last_validation():
    tested = [REFERENCE, POLICY | {"gold_gain": -0.3, "reward_gain": 0.4}]
    found = policy_findings([REFERENCE, POLICY], (), tested)
    assert [finding.level for finding in found if finding.level != "good"] == ["bad"]
    assert "prefers the policy to the reference: +0.4 on test prompts (95% interval" in found[0].text
    # Of a folder in which nothing was trained, too.
    assert policy_findings([], (), tested) == found
    # What the validations said of the course stays.
    best = POLICY | {"iteration": 4, "gold_gain": 0.6}
    assert any("at iteration 4" in finding.text for finding in policy_findings([REFERENCE, best, POLICY], (), tested))


def test_members_say_nothing_of_a_policy_that_has_not_moved():
    still = POLICY | {"reward_member_0": 0.0, "reward_member_1": 0.0}
    assert not any("members that are logged" in finding.text for finding in policy_findings([REFERENCE, still]))


def test_without_evaluations_nothing_is_claimed():
    (finding,) = policy_findings([])
    assert finding.level == "look"


def test_a_verdict_keeps_its_advice():
    said = ["Better than a coin: x.", "WARNING: σ does not.", "Expect little.", "WARNING: length moves.", "Try more."]
    assert verdict_findings(said) == [
        ("good", "Better than a coin: x."),
        ("bad", "σ does not. Expect little."),
        ("bad", "Length moves. Try more."),
    ]
    assert verdict_findings(["Errors: 1 of 4 are too few to say."])[0].level == "look"


@pytest.fixture(scope="module")
def tested(tmp_path_factory, ppo_run, stage_args, tiny_ensemble_dir):
    """A run of PPO that was tested."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(ppo_run, folder)
    main(
        stage_args("ppo", "test", folder, ckpt_path=f"{folder}/checkpoints/last.ckpt", model__reward=tiny_ensemble_dir)
    )
    return folder


def test_a_page_shows_what_the_run_wrote_and_nothing_runs_in_it(tested, capsys):
    responses = tested / "test/responses.jsonl"
    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    rows[0]["response"] = "<script>alert(1)</script> & more"
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["report", str(tested)])
    out = capsys.readouterr().out
    page = (tested / "report.html").read_text()
    assert out.endswith(f"report: {tested}/report.html\n")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "<script" not in page
    assert 'src="http' not in page
    assert page.count("data:image/png;base64,") == 3
    assert all(finding.text.split("'")[0] in page for finding in read_run(tested).findings)
    assert "max_new_tokens: 6" in page


def test_runs_are_set_side_by_side(tested, reward_run, tmp_path):
    main(["report", str(tested), str(reward_run), f"--output={tmp_path}/new/both.html"])
    text = (tmp_path / "new/both.html").read_text()
    assert "Side by side" in text
    assert text.index("Side by side") < text.index("Whether to trust it")
    assert "Not tested yet: lit-vapo reward test" in text


def test_settings_that_differ_are_set_side_by_side(tested):
    run = read_run(tested)
    other = replace(run, name="other", settings=run.settings.replace("max_new_tokens: 6", "max_new_tokens: 7"))
    assert other.settings != run.settings
    table = page([run, other]).partition("Whether to trust it")[0]
    assert "<tr><th>model.sampling.max_new_tokens</th><td>6</td><td>7</td></tr>" in table
    assert "model.seed" not in table
    assert "Side by side" not in page([run])


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What only a browser knows: whether all fits its width, whether pictures are there, and whether models' words ran.
PROBE = """<script>onload = () => document.documentElement.dataset.seen = JSON.stringify({
  wide: document.documentElement.scrollWidth - innerWidth,
  pictures: [...document.images].filter(x => !x.naturalWidth).length,
  flat: [...document.querySelectorAll("h2, p, td, img")].filter(x => x.innerText && !x.getClientRects().length &&
    !x.closest("details")).length,
  ran: "ran" in window})</script>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [500, 1300])
def test_a_browser_shows_all_of_a_page_and_runs_nothing_of_it(tested, reward_run, tmp_path, width):
    responses = tested / "test/responses.jsonl"
    rows = [json.loads(line) for line in responses.read_text().splitlines()]
    rows[0]["response"] = "<script>ran = 1</script><img src=x onerror='ran = 1'> " + "W" * 300
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "both.html"
    main(["report", str(tested), str(reward_run), f"--output={page}"])
    page.write_text(page.read_text() + PROBE)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser"]
    command += [f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout)[1]))
    assert seen == {"wide": seen["wide"], "pictures": 0, "flat": 0, "ran": False}
    assert seen["wide"] <= 0


@pytest.mark.report
def test_a_run_ends_with_its_page_and_a_test_renews_it(stage_args, tmp_path, capsys):
    folder = tmp_path / "run"
    main(stage_args("reward", "fit", folder))
    assert f"report: {folder}/report.html" in capsys.readouterr().out
    before = (folder / "report.html").read_text()
    assert "Not tested yet" in before
    assert "not yet" not in before.replace("Not tested yet", "")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    main(stage_args("reward", "test", folder, f"--ckpt_path={checkpoint}"))
    assert "Not tested yet" not in (folder / "report.html").read_text()
    # It goes where the run goes.
    assert folder / "report.html" in replaced_by_run(folder, [])
    main(stage_args("reward", "fit", folder, "--overwrite=true"))
    assert "Not tested yet" in (folder / "report.html").read_text()


@pytest.mark.report
def test_a_test_in_a_folder_of_its_own_is_judged(stage_args, ppo_run, tiny_ensemble_dir, tmp_path):
    last = ppo_run / "checkpoints/last.ckpt"
    main(stage_args("ppo", "test", tmp_path / "run", ckpt_path=last, model__reward=tiny_ensemble_dir))
    run = read_run(tmp_path / "run")
    assert "on test prompts" in run.findings[0].text
    assert run.findings[0].text in html.unescape((tmp_path / "run/report.html").read_text())
    steps = json.loads((ppo_run / "finished.json").read_text())["steps"]
    assert run.facts["tested"] == f"after {steps} weight updates"
    record = json.loads((tmp_path / "run/test/evaluation.json").read_text())
    assert run.figures["reward_gain"] == record["comparison"]["reward_gain"]
    assert run.figures["kl_k3"] == record["policy"]["kl_k3"]


@pytest.mark.report
def test_a_test_that_is_older_than_the_training_is_not_judged(stage_args, ppo_run, tiny_ensemble_dir, tmp_path):
    folder = shutil.copytree(ppo_run, tmp_path / "run")
    last, reward = folder / "checkpoints/last.ckpt", {"model__reward": tiny_ensemble_dir}
    main(stage_args("ppo", "test", folder, ckpt_path=last, **reward))
    assert "on test prompts" in (folder / "report.html").read_text()
    main(stage_args("ppo", "fit", folder, "--resume", "--trainer.max_epochs=2", **reward))
    page = html.unescape((folder / "report.html").read_text())
    assert "on test prompts" not in page
    assert "on validation prompts" in page
    assert "A test here is older than the training: lit-vapo ppo test renews it." in page
    run = read_run(folder)
    assert "tested" not in run.facts
    assert run.pictures["Gain over the reference against √KL"] == folder / "overoptimisation.png"
    record = json.loads((folder / "finished.json").read_text())
    assert run.facts["ended"].endswith(f", after {record['steps']} weight updates")
    main(stage_args("ppo", "test", folder, ckpt_path=last, **reward))
    assert "older than" not in (folder / "report.html").read_text()
    assert json.loads((folder / "test/evaluation.json").read_text())["step"] == record["steps"]


def test_a_run_that_goes_on_is_found_by_its_mark(reward_run, tmp_path):
    folder = shutil.copytree(reward_run, tmp_path / "run")
    shutil.move(folder / "logs/version_0", tmp_path / "elsewhere")
    for text in ("", "{", "[]"):
        (folder / "finished.json").write_text(text)
        with pytest.raises(ValueError, match="expected the folder of a run"):
            read_run(folder)
    (folder / "finished.json").unlink()
    (folder / "running.json").write_text('{"process": 1, "logs": ["../elsewhere"]}')
    assert read_run(folder).facts["ended"] == "not yet"


@pytest.mark.report
def test_a_page_is_about_the_run_that_replaced_another(stage_args, tmp_path):
    folder = tmp_path / "run"
    main(stage_args("reward", "fit", folder))
    once = read_run(folder)
    main(stage_args("reward", "fit", folder, "--overwrite=true", "--model.learning_rate=0.0123"))
    again = read_run(folder)
    assert "learning_rate: 0.0123" in again.settings
    assert "learning_rate: 0.0123" not in once.settings
    assert "learning_rate: 0.0123" in (folder / "report.html").read_text()
    assert json.loads((folder / "finished.json").read_text())["logs"] == ["logs/version_1"]


def test_without_a_mark_the_newest_training_is_shown(reward_run, tmp_path):
    folder = shutil.copytree(reward_run, tmp_path / "run")
    (folder / "finished.json").unlink()
    logs = folder / "logs"
    settings = (logs / "version_0/config.yaml").read_text()
    for number, metric in ((2, "val/nll"), (10, "train/loss"), (11, "test/nll")):
        (logs / f"version_{number}").mkdir()
        (logs / f"version_{number}/config.yaml").write_text(re.sub(r"seed: \d+", f"seed: {number}", settings, count=1))
        (logs / f"version_{number}/metrics.csv").write_text(f"step,{metric}\n0,1\n")
    # Whoever names a version has a folder without a number.
    shutil.copytree(logs / "version_0", logs / "mine")
    assert "seed: 10" in read_run(folder).settings
    (logs / "version_10/config-2.yaml").write_text(settings.replace("seed_everything: 0", "seed_everything: 22"))
    (logs / "version_10/config-11.yaml").write_text(settings.replace("seed_everything: 0", "seed_everything: 111"))
    assert "seed_everything: 111" in read_run(folder).settings
    # Whatever a mark says goes before.
    (folder / "finished.json").write_text('{"logs": ["logs/version_0"]}')
    assert yaml.safe_load(read_run(folder).settings) == yaml.safe_load(settings)


@pytest.mark.report
@pytest.mark.filterwarnings("error:no report")
def test_a_run_that_logs_elsewhere_has_its_page(stage_args, tmp_path):
    folder = tmp_path / "run"
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "csv", "version": "mine"}}
    main(stage_args("reward", "fit", folder, f"--trainer.logger={json.dumps(logger)}"))
    assert not (folder / "logs").exists()
    (folder / "report.html").unlink()
    main(["report", str(folder)])
    assert (folder / "report.html").is_file()
    assert "version: mine" in read_run(folder).settings


@pytest.mark.report
def test_every_stage_has_a_page_and_a_trial_has_none(stage_args, tiny_ensemble_dir, reward_run, tmp_path, capsys):
    main(stage_args("sft", "fit", tmp_path / "sft"))
    assert "The course of the run" in (tmp_path / "sft/report.html").read_text()
    main(stage_args("ppo", "fit", tmp_path / "ppo", model__reward=tiny_ensemble_dir))
    assert "on validation prompts" in (tmp_path / "ppo/report.html").read_text()
    capsys.readouterr()
    main(stage_args("reward", "fit", tmp_path / "trial", "--trainer.fast_dev_run=true"))
    last = reward_run / "checkpoints" / "last.ckpt"
    main(stage_args("reward", "test", tmp_path / "trial", "--trainer.fast_dev_run=true", ckpt_path=last))
    assert "report" not in capsys.readouterr().out


@pytest.mark.report
def test_a_page_that_cannot_be_written_does_not_fail_the_run(reward_run, tmp_path):
    folder = shutil.copytree(reward_run, tmp_path / "run")
    (folder / "finished.json").write_text('{"ended": 5}')
    with pytest.warns(UserWarning, match="no report could be written .*TypeError.*lit-vapo report"):
        write_page(folder)


def test_a_reward_run_is_judged_by_its_test_or_else_by_its_last_validation(reward_run, tmp_path):
    folder = shutil.copytree(reward_run, tmp_path / "run")
    untested = "Not tested yet: lit-vapo reward test says whether to trust it."
    assert read_run(folder).findings == [("look", untested)]
    rows = [
        "epoch,step,train/loss,val/accuracy,val/nll,val/ece",
        "0,0,1.5,,,",
        "0,1,,0.5,0.7,0.2",
        "1,3,,0.75,0.6,0.1",
        "1,4,1.0,,,",
    ]
    (folder / "logs/version_0/metrics.csv").write_text("\n".join(rows) + "\n")
    found = read_run(folder)
    assert found.figures == {"accuracy": 0.75, "nll": 0.6, "ece": 0.1}
    said = f"{untested} The last validation found accuracy 0.75, nll 0.6, ece 0.1."
    assert found.findings == [("look", said)]
    (folder / "test").mkdir()
    record = {"mean": {"accuracy": 0.125, "nll": 1.0, "ece": 0.5}, "verdict": {"sentences": ["Better than a coin: x."]}}
    (folder / "test/evaluation.json").write_text(json.dumps(record))
    assert read_run(folder).figures == record["mean"]
    assert read_run(folder).findings == [("good", "Better than a coin: x.")]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}: expected the folder of a run .*, got none"):
        main(["report", str(tmp_path)])
