"""Small runs of every stage and estimator, as command lines."""

import helpers

COMMON = ("seed_everything=3",)
TRAINER = {
    "trainer.devices": "1",
    "trainer.max_epochs": "2",
    "trainer.log_every_n_steps": "1",
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "trainer.num_sanity_val_steps": "0",
    "checkpoint.every_iterations": "1",
    "data.batch_size": "4",
}
PAIRS = {"data.max_length": "64", "trainer.val_check_interval": "2"}
REWARD = {
    **PAIRS,
    "model.learning_rate": "0.01",
    "model.layer": "2",
    "model.num_reference": "6",
    "model.reference_sampling.max_new_tokens": "4",
}
PPO = {
    "trainer.val_check_interval": "2",
    "data.max_prompt_length": "32",
    "model.sampling.max_new_tokens": "6",
    "model.update.epochs": "1",
    "model.update.minibatches": "2",
    "model.learning_rate": "0.01",
    "model.num_reference": "8",
    "model.lora.rank": "2",
}


def head(name, **options):
    return {"model.head": name, **{f"model.head.init_args.{key}": str(value) for key, value in options.items()}}


STREAM = {"data.streaming": "true", "data.validation_fraction": "0", "data.stream_buffer": "8"}
KINDS = {
    "sft": ("sft", PAIRS),
    "sft-lora-workers": ("sft", {**PAIRS, "model.lora.rank": "2", "data.num_workers": "2"}),
    "sft-accumulated": ("sft", {**PAIRS, "trainer.accumulate_grad_batches": "2"}),
    "sft-stream": ("sft", {**PAIRS, **STREAM, "trainer.max_epochs": "9", "trainer.max_steps": "6"}),
    "heads": ("reward", {**REWARD, **head("HeadEnsemble", num_members=3)}),
    "aleatoric": ("reward", {**REWARD, **head("AleatoricEnsemble", num_members=3)}),
    "heads-trained-backbone": (
        "reward",
        {**REWARD, **head("HeadEnsemble", num_members=3), "model.freeze_backbone": "false"},
    ),
    "dropout": ("reward", {**REWARD, **head("McDropout", num_members=3)}),
    "bayesian": ("reward", {**REWARD, **head("BayesianLinear", num_members=3)}),
    "lora": ("reward", {**REWARD, **head("LoraEnsemble", num_members=2, rank=2)}),
    "full": ("reward", {**REWARD, **head("FullEnsemble", num_members=2)}),
    "ppo": ("ppo", {**PPO, "model.kl_target": "1.0"}),
    "ppo-covariance-rloo": (
        "ppo",
        {
            **PPO,
            "model.objective": "CovarianceAware",
            "model.advantage": "Rloo",
            "model.sampling.num_responses": "2",
        },
    ),
}


class World:
    """The files that all runs read."""

    def __init__(self, folder, accelerator="cpu"):
        self.folder = folder
        self.accelerator = accelerator
        self.model = helpers.tiny_model(folder / "model", helpers.tiny_tokenizer(folder / "model", chat_template=True))
        self.pairs = helpers.tiny_preferences(folder / "pairs.jsonl", 12)
        self.held_out = helpers.tiny_preferences(folder / "held.jsonl", 3)
        self.prompts = helpers.tiny_prompts(folder / "prompts.jsonl", 12)
        self.prompts_held_out = helpers.tiny_prompts(folder / "held_prompts.jsonl", 3)
        self.ensemble = folder / "ensemble"

    def words(self, kind, folder, *more, **replaced):
        """The command line of a run."""
        stage, options = KINDS[kind]
        given = {
            **TRAINER,
            "trainer.accelerator": self.accelerator,
            "trainer.default_root_dir": folder,
            "model.base.path": self.model,
            "data.tokenizer": self.model,
            "data.preferences": self.pairs,
            "data.preferences_validation": self.held_out,
            **options,
        }
        if stage == "reward":
            given["model.reference.path"] = self.model
        if stage == "ppo":
            given["model.reward"] = self.ensemble
            given["data.prompts"] = self.prompts
            given["data.prompts_validation"] = self.prompts_held_out
        if given.get("data.streaming"):
            del given["data.preferences_validation"], given["trainer.val_check_interval"]
        given |= {key.replace("__", "."): value for key, value in replaced.items()}
        return [stage, "fit", "--seed_everything=3", *(f"--{key}={value}" for key, value in given.items()), *more]

    def make_ensemble(self, server, log):
        """An ensemble for PPO, by its commands."""
        folder = self.folder / "ensemble-run"
        code, _ = server.run(self.words("heads", folder), log)
        assert code == 0, log.read_text()
        checkpoint = f"--checkpoint={folder}/checkpoints/last.ckpt"
        code, _ = server.run(["export", checkpoint, f"--output={self.ensemble}"], log)
        assert code == 0, log.read_text()
