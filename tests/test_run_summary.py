"""What a run says before it begins and after it has ended."""

from lit_vapo.cli import main


def lines(out):
    """Lines of a name and what belongs to it."""
    return dict(line.split("  ", 1) for line in out.splitlines() if "  " in line and not line.startswith(" "))


def test_ppo_says_what_it_is_about_and_what_came_of_it(stage_args, tiny_ensemble_dir, tiny_model_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    main(stage_args("ppo", "fit", folder, model__reward=tiny_ensemble_dir))
    out = capsys.readouterr().out
    said = {name.strip(): value.strip() for name, value in lines(out).items()}
    assert said["model"] == str(tiny_model_dir)
    assert said["reward"] == f"{tiny_ensemble_dir}, 3 members"
    assert said["objective"] == "VarianceAware, β = 0.05"
    assert said["device"] == "cpu, 1 process, 32-true"
    assert said["run"] == f"{folder}, until max_epochs=1"
    assert float(said["train/kl_k3"]) >= 0
    assert said["checkpoint"] == f"{folder}/checkpoints/last.ckpt"
    # What it says to do next can be done.
    words = said["next"].replace("FOLDER", str(tmp_path / "policy")).split()
    assert words[:2] == ["lit-vapo", "export"]
    main(words[1:])
    assert (tmp_path / "policy/adapter_config.json").is_file()
    # Before anything is loaded, and after all else.
    assert out.startswith("model ")
    assert out.splitlines()[-1].startswith("next")


def test_the_other_stages_say_what_they_train(stage_args, tmp_path, capsys):
    main(stage_args("reward", "fit", tmp_path / "a", data__sample=20))
    said = capsys.readouterr().out
    assert "members  3, HeadEnsemble" in said
    assert "data     a sample of at most 20 rows (data.sample)" in said
    main(stage_args("sft", "fit", tmp_path / "b"))
    assert "trains  all weights" in capsys.readouterr().out
