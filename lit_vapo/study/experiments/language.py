"""Level 2: a small language model, PPO as it is, and a true reward that only the study sees."""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Trainer

from lit_vapo.advantages.base import AdvantageEstimator
from lit_vapo.advantages.rloo import Rloo
from lit_vapo.commands.notices import WARNINGS
from lit_vapo.data.datamodule import PromptDataModule
from lit_vapo.models.generation import Sampling
from lit_vapo.models.pretrained import Lora
from lit_vapo.models.weights import quiet
from lit_vapo.objectives.base import Objective
from lit_vapo.rewards import HeldEnsemble, RewardSource
from lit_vapo.rewards.members.base import RewardHead
from lit_vapo.rewards.reward_model import RewardModel
from lit_vapo.stages.ppo.module import PPOModule
from lit_vapo.stages.ppo.update import UpdateSettings
from lit_vapo.study.experiment import Experiment, Record, Repetition, expect
from lit_vapo.study.experiments.learner import examine
from lit_vapo.study.experiments.training_course import TrainingCourse
from lit_vapo.study.experiments.truth import Truth

# Of the prompts, for evaluations.
SET_ASIDE = 0.05
# A run of a study is one of hundreds.
UNHEARD = (
    ".*does not have many workers.*",
    ".*responses \\(0%\\) ended by themselves.*",
    ".*`?isinstance\\(treespec, LeafSpec\\)`? is deprecated.*",
)


@dataclass
class Training:
    """How every method of a study trains: options of the ppo stage, with defaults for a small model from scratch.

    The defaults have many responses to few prompts, since the gradient is small beside its noise and a prompt is read
    once; and a KL that is dear at first, so that a weight acts while the policy is near, until β has fallen so far that
    the KL nears its target.

    Args:
        iterations: Rollouts; each is a point of the run, and the last is what the run is judged by (the update that
            follows it is not), unless there are evaluations.
        batch_size: Prompts of a rollout.
        max_prompt_length: Most tokens of a prompt.
        sampling: How responses are drawn.
        advantage: What a token is better than; `null` for the other responses to the prompt (`Rloo`).
        update: How PPO learns from a rollout.
        lora: Adapters to train; `null` trains all weights.
        learning_rate: Peak learning rate of the actor.
        critic_learning_rate: Peak learning rate of the critic, where the advantage needs one.
        kl_coef: β, in units of reward per nat.
        kl_target: Plain KL in nats that β is adapted to reach, or `null` for a fixed β.
        ema_decay: Decay of the averaged policy, an iteration, or `null` for none; it is what evaluations are of.
        evaluations: Points of a run, at equal distances, the last at its end: evaluations on prompts that are set
            aside. 0 for the rollouts.
        held_out: Prompts of an evaluation, in whole rollouts.
    """

    iterations: int = 24
    batch_size: int = 24
    max_prompt_length: int = 32
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=6, num_responses=16))
    advantage: AdvantageEstimator | None = None
    update: UpdateSettings = field(default_factory=lambda: UpdateSettings(epochs=1))
    lora: Lora | None = None
    learning_rate: float = 3e-4
    critic_learning_rate: float = 1e-3
    kl_coef: float = 3.0
    kl_target: float | None = 1.0
    ema_decay: float | None = None
    evaluations: int = 0
    held_out: int = 96

    def __post_init__(self) -> None:
        if self.ema_decay is not None:
            expect("training.evaluations", self.evaluations, self.evaluations > 0, "some, of the averaged policy")
        if self.evaluations:
            even = self.iterations % self.evaluations == 0
            expect("training.evaluations", self.evaluations, even, f"a divisor of iterations = {self.iterations}")
            whole = self.held_out >= self.batch_size and self.held_out % self.batch_size == 0
            expect("training.held_out", self.held_out, whole, f"a multiple of batch_size = {self.batch_size}")


class LanguageModelStudy(Experiment):
    """Methods that align one language model against the same ensemble, in every repetition a new one.

    A subclass says what the ensemble of a repetition is; the ordinary `PPOModule` then trains every method against it,
    from the same start, with the same prompts and the same random numbers. A run's points are its rollouts, on prompts
    that it has not seen before.

    Args:
        prepared: Folder of what was prepared (see `Truth.prepared`).
        methods: What each method maximises, by name.
        training: How all of them train.

    Raises:
        ValueError: There are no methods.
    """

    def __init__(self, prepared: str, methods: dict[str, Objective], training: Training | None = None) -> None:
        expect("methods", "none", bool(methods), "at least one")
        self.prepared = Path(prepared)
        self.methods = methods
        self.training = training or Training()

    @abstractmethod
    def ensemble(self, params: Mapping[str, Any], seed: int) -> RewardHead:
        """The ensemble of a repetition: a head on the features of the true reward, calibrated.

        Args:
            params: What is known of the setting.
            seed: Where all its random numbers come from.
        """

    @cached_property
    def truth(self) -> Truth:
        """What is true here, and what else is known of the task; a study of another kind gives another."""
        return Truth.prepared(self.prepared)

    @cached_property
    def prompts(self) -> PromptDataModule:
        """The prompts of all runs, read once.

        Raises:
            ValueError: There are too few for a run that sees each but once.
        """
        training, file = self.training, self.truth.prompts_file
        data = PromptDataModule(
            self.truth.spec.base.path,
            prompts=str(file),
            batch_size=training.batch_size,
            max_prompt_length=training.max_prompt_length,
            validation_fraction=SET_ASIDE if training.evaluations else 0.0,
        )
        wanted = {"train": ("iterations · batch_size", training.iterations * training.batch_size)}
        if training.evaluations:
            wanted["val"] = ("held_out", training.held_out)
        for split, (name, needed) in wanted.items():
            if (there := len(data.prompt_rows(split))) < needed:
                raise ValueError(f"{file}: expected at least {needed} prompts ({name}), got {there}")
        return data

    def __getstate__(self) -> dict[str, Any]:
        """What goes to other processes: not what is read from files."""
        return {n: x for n, x in vars(self).items() if not isinstance(getattr(type(self), n, None), cached_property)}

    def run_block(self, setting: str, repetitions: Sequence[Repetition]) -> list[Record]:
        """One ensemble for each repetition, every method."""
        return [record for repetition in repetitions for record in self._repeat(setting, repetition)]

    def _repeat(self, setting: str, repetition: Repetition) -> list[Record]:
        # The reference's return is that of its responses, which ensembles are calibrated on as well.
        truth, sampling = self.truth, self.training.sampling
        same = Sampling(truth.response_tokens or sampling.max_new_tokens, num_responses=sampling.num_responses)
        expect("training.sampling", sampling, sampling == same, f"that of the responses in {self.prepared}, {same}")
        head = self.ensemble(self.settings[setting], repetition.seed)
        records, known = [], self._knows(head)
        with TemporaryDirectory() as scratch:
            for name, objective in self.methods.items():
                reward = HeldEnsemble(RewardModel(truth.spec, copy.deepcopy(head), None).requires_grad_(False).eval())
                seen = self._train(copy.deepcopy(objective), reward, Path(scratch), repetition.seed)
                base = truth.reference_return
                records.append(Record(name, setting, *repetition, seen.kl, seen.true_return, base, known | seen.last))
        return records

    @torch.no_grad()
    def _knows(self, head: RewardHead) -> dict[str, float]:
        """What an ensemble knows of the reference's responses, one to each prompt, where the truth of them is known."""
        truth = self.truth
        if truth.reward is None:
            return {}
        estimate = head(truth.reference)
        return examine(estimate.mean[None], estimate.variance[None], truth.reward(truth.reference)[None])

    def _train(self, objective: Objective, reward: RewardSource, scratch: Path, seed: int) -> TrainingCourse:
        """One run of one method."""
        training = self.training
        watch = TrainingCourse(self.truth, held_out=training.evaluations > 0)
        quiet()
        with warnings.catch_warnings(), _unheard("lightning.pytorch"):
            for message in (*WARNINGS, *UNHEARD):
                warnings.filterwarnings("ignore", message=message)
            module = PPOModule(
                self.truth.spec.base,
                reward,
                objective,
                lora=training.lora,
                sampling=training.sampling,
                advantage=training.advantage or Rloo(),
                update=training.update,
                learning_rate=training.learning_rate,
                critic_learning_rate=training.critic_learning_rate,
                kl_coef=training.kl_coef,
                kl_target=training.kl_target,
                ema_decay=training.ema_decay,
                gold=self.truth.judge,
            )
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                limit_train_batches=training.iterations,
                limit_val_batches=training.held_out // training.batch_size if training.evaluations else 0,
                val_check_interval=training.iterations // max(training.evaluations, 1),
                num_sanity_val_steps=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[watch],
                default_root_dir=scratch,
            )
            torch.manual_seed(seed)
            trainer.fit(module, self.prompts)
        # Module and trainer refer to each other; the next run should not wait for the memory of this one.
        del module, trainer
        gc.collect()
        return watch


@contextmanager
def _unheard(name: str) -> Iterator[None]:
    """A block in which a logger speaks of warnings only."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
