"""What a finished run tells W&B of what it has read and made: one name for one thing, whichever run it is."""

import shutil

import pytest
from helpers import CONFIGS, last
from test_wandb import finished

from lit_vapo.cli import main
from lit_vapo.models.digests import check_sealed
from lit_vapo.models.origin import Origin, read_origin

wandb = pytest.importorskip("wandb")


@pytest.fixture(scope="module")
def fit(tmp_path_factory, stage_args):
    """Run a stage with W&B offline; all it told of artifacts, as `{name: …}` of those read and of those made."""
    # Files of artifacts wait there to be sent.
    patch = pytest.MonkeyPatch()
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
        patch.setenv(name, str(tmp_path_factory.mktemp("artifacts")))

    def call(stage, run, *options, **replaced):
        folder = tmp_path_factory.mktemp("boards")
        words = [f"--config={CONFIGS / 'logger' / 'wandb.yaml'}", f"--trainer.logger.init_args.save_dir={folder}"]
        words += ["--trainer.logger.init_args.offline=true", *options]
        main(stage_args(stage, "fit", run, *words, **replaced))
        wandb.finish()
        (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        told = [r.request.log_artifact.artifact for r in finished(file) if r.request.HasField("log_artifact")]
        told += [r.artifact for r in finished(file) if r.HasField("artifact")]
        told = [x for x in told if x.user_created]
        return ({x.name: x for x in told if x.use_after_commit}, {x.name: x for x in told if not x.use_after_commit})

    yield call
    patch.undo()


@pytest.fixture(scope="module")
def chain(fit, tmp_path_factory):
    """Data to ensemble to policy, and once more from the same ensemble."""
    root = tmp_path_factory.mktemp("chain")
    found = {"root": root, "reward": fit("reward", root / "reward")}
    main(["export", f"--checkpoint={last(root / 'reward')}", f"--output={root / 'ensemble'}"])
    shutil.copytree(root / "ensemble", root / "copy")
    found["ppo"] = fit("ppo", root / "ppo", model__reward=root / "ensemble")
    found["again"] = fit("ppo", root / "again", model__reward=root / "copy", seed_everything=5)
    return found


def of_kind(things, kind):
    return [name for name, thing in things.items() if thing.type == kind]


def digests(thing):
    return {(entry.path, entry.digest) for entry in thing.manifest.contents}


def test_lineage_leads_from_data_to_ensemble_to_policy(chain):
    read, made = chain["reward"]
    assert {thing.type for thing in read.values()} == {"data", "tokenizer", "model"}
    (ensemble,) = made
    assert made[ensemble].type == "ensemble"
    assert set(made[ensemble].aliases) >= {"last", "best"}
    for run in ("ppo", "again"):
        read, made = chain[run]
        # What the reward run made is what this one reads, in W&B's eyes too: of the same name and contents.
        assert of_kind(read, "ensemble") == [ensemble]
        assert digests(read[ensemble]) == digests(chain["reward"][1][ensemble])
        assert len(digests(read[ensemble])) == 1
        assert of_kind(made, "policy") == list(made)
        assert of_kind(read, "data")
    assert chain["ppo"][1].keys() != chain["again"][1].keys()


def test_the_same_things_have_the_same_names(chain):
    (reward, _), (ppo, _), (again, _) = chain["reward"], chain["ppo"], chain["again"]
    for kind in ("model", "tokenizer"):
        assert of_kind(reward, kind) == of_kind(ppo, kind) == of_kind(again, kind)
    # Preferences and prompts are different data.
    assert not set(of_kind(reward, "data")) & set(of_kind(ppo, "data"))
    assert "data.preferences (train)" in {thing.description for thing in reward.values()}


def test_no_weights_are_among_what_is_sent(chain):
    for read, made in (chain["reward"], chain["ppo"]):
        for thing in (*read.values(), *made.values()):
            assert [entry.path for entry in thing.manifest.contents] == ["origin.json"]
            assert thing.manifest.contents[0].size < 1000


def test_an_export_says_what_it_was_made_of(chain):
    root = chain["root"]
    origin = read_origin(root / "ensemble")
    assert origin == Origin.of("reward", last(root / "reward"))
    check_sealed(root / "ensemble", "origin.json")
    # Whatever the checkpoint is called.
    shutil.copyfile(last(root / "reward"), root / "other.ckpt")
    assert Origin.of("reward", root / "other.ckpt") == origin
    assert Origin.of("ppo", last(root / "ppo")).checkpoint != origin.checkpoint
    assert read_origin(root) is None


def test_a_run_that_goes_on_from_a_policy_reads_what_made_it(chain, fit):
    root = chain["root"]
    (policy,) = chain["ppo"][1]
    main(["export", f"--checkpoint={last(root / 'ppo')}", f"--output={root / 'policy'}"])
    options = {"model__reward": root / "ensemble", "model__policy": root / "policy"}
    read, made = fit("ppo", root / "further", **options)
    assert of_kind(read, "policy") == [policy]
    assert policy not in made


def test_an_origin_that_says_something_else_is_refused(tmp_path):
    (tmp_path / "origin.json").write_text('{"stage": "reward", "checkpoint": "../../etc"}')
    with pytest.raises(ValueError, match=r"origin.json: checkpoint: .*got '../../etc'"):
        read_origin(tmp_path)
