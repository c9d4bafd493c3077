"""How the PPO stage evaluates: the policy and its reference answer the same held-out prompts."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lit_vapo import figures
from lit_vapo.data.collate import PromptBatch
from lit_vapo.evaluation.policy_files import evaluation_row, policy_evaluation, read_evaluations, write_evaluations
from lit_vapo.evaluation.policy_report import PolicyReport, compare
from lit_vapo.evaluation.preference_files import write_json
from lit_vapo.metrics import ResponseMetrics, sample_rows
from lit_vapo.models.averaging import WeightAverage
from lit_vapo.models.policy import Role
from lit_vapo.objectives.base import Objective
from lit_vapo.rollout import RolloutMaker
from lit_vapo.stages.base import TrainedWeightsModule
from lit_vapo.stages.seeding import seeded
from lit_vapo.trackers import log_picture

TEST_FOLDER = "test"
COURSE = "evaluations.csv"
PICTURE = "overoptimisation.png"
POLICY, REFERENCE = "policy", "reference"
# What the state of averaged weights begins with.
AVERAGE = "average."
# What is added to the number of updates where averaged weights are meant. No run has as many.
AVERAGED = 10**9


class EvaluatedPolicy(TrainedWeightsModule):
    """Evaluates a policy on held-out prompts against its reference; training is the subclass's.

    Every batch is answered with random numbers that depend on `seed` and its prompts alone, and those of policy and
    reference are the same, so evaluations differ by the policy. In a run, the reference answers each prompt of the
    validation once. Figures are over all responses of all processes.
    """

    objective: Objective
    first_objective: Objective
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self.maker: RolloutMaker | None = None
        self.average: WeightAverage | None = None
        self.samples: list[dict[str, Any]] = []
        self.metrics = nn.ModuleDict({POLICY: ResponseMetrics(), REFERENCE: ResponseMetrics()})
        self.evaluations: list[dict[str, Any]] = []
        self._answered: set[int] = set()
        self._unwritten = False

    @abstractmethod
    def start(self) -> None:
        """Make the rollout maker, now that device and data are known."""

    def setup(self, stage: str) -> None:
        """Forget what the last run answered."""
        super().setup(stage)
        self._reset(POLICY, REFERENCE)

    def on_train_start(self) -> None:
        """Take up the evaluations of the run that is resumed, as far as it had come."""
        done = self.iteration
        found = read_evaluations(self._root / COURSE) if self.trainer.is_global_zero and done else []
        self.evaluations = [row for row in found if row["iteration"] <= done]

    def on_validation_start(self) -> None:
        """Get ready to roll out, if `validate` is all that runs."""
        if self.trainer.state.fn != "fit":
            self.start()
        self._reset(POLICY)

    def on_test_start(self) -> None:
        """Get ready to roll out."""
        self.start()

    def on_predict_start(self) -> None:
        """Get ready to roll out."""
        self.start()

    def teardown(self, stage: str) -> None:
        """Let go of what the generator holds."""
        if self.maker is not None:
            self.maker.generator.close()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """The policy answers held-out prompts, and so does the reference where it has not yet."""
        prompts = set(batch.example_ids.tolist())
        if not prompts <= self._answered:
            self._answer(batch, "reference")
            self._answered |= prompts
        self._answer(batch, "actor")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Reference and policy answer the same held-out prompts."""
        self._answer(batch, "reference")
        self._answer(batch, "actor")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Responses of the policy, scored."""
        return self._answer(batch, "actor")

    def _answer(self, batch: PromptBatch, role: Role) -> list[dict[str, Any]]:
        assert self.maker is not None
        # In a run the reference is judged once, and by what the run begins with, since that does not depend on when.
        first = role == "reference" and self.trainer.state.fn == "fit"
        objective = self.first_objective if first else self.objective
        # To change the weights for the reference would be work for nothing.
        weights = self.product() if role == "actor" else nullcontext()
        with seeded((self.seed * 100_003 + int(batch.example_ids[0])) % 2**63), weights:
            rollout = self.maker.make(batch, objective, role, values=False, version=self.product_version)
        who = POLICY if role == "actor" else REFERENCE
        records = sample_rows(rollout, who, batch.example_ids)
        cast("ResponseMetrics", self.metrics[who]).update(records)
        return records

    def on_validation_epoch_end(self) -> None:
        """Log how the policy does beside its reference, and write the course of the run so far."""
        policy = self._report(POLICY, "val")
        reference = self._report(REFERENCE, "val").select(policy.prompt_ids)
        self.samples = policy.records
        found = policy.summary() | compare(policy, reference)
        self._log_figures("val", found)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking and self.trainer.is_global_zero:
            self._write_course(reference.summary(), found)

    def on_test_epoch_end(self) -> None:
        """Log policy and reference, and write all that a test says."""
        policy, reference = self._report(POLICY, "test"), self._report(REFERENCE, "test")
        self.samples = self._in_order([*reference.records, *policy.records], "test")
        record = {"step": self.trained_steps, **policy_evaluation(policy, reference)}
        self._log_figures("test", record["policy"] | record["comparison"])
        self._log_figures("test_reference", record["reference"])
        if self.trainer.is_global_zero:
            write_json(self._root / TEST_FOLDER / "evaluation.json", record)
            rows = [evaluation_row(REFERENCE, 0, 0, record["reference"])]
            rows.append(evaluation_row(POLICY, 0, 0, record["policy"] | record["comparison"]))
            course = read_evaluations(self._root / COURSE)
            best = record.get("best_of_n", {}).get(REFERENCE)
            self._draw(f"{TEST_FOLDER}/{PICTURE}", "test", course, rows, best)

    def on_predict_epoch_end(self) -> None:
        """Put the responses of all processes together."""
        self.samples = self._report(POLICY, "predict").records

    # Averaged weights.

    def product(self) -> AbstractContextManager[None]:
        """A block in which the policy is the one that is evaluated and exported: the averaged one, if there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    @property
    def product_version(self) -> int:
        """Version of the weights that are evaluated, which no others have."""
        return self.weights_version + (0 if self.average is None else AVERAGED)

    def choose_state(self, checkpoint: dict[str, Any]) -> None:
        """Begin an average that the checkpoint lacks with its weights, and leave one out that this run has not."""
        super().choose_state(checkpoint)
        state = checkpoint["state_dict"]
        averaged = {name for name in state if name.startswith(AVERAGE)}
        if averaged and self.average is None:
            rank_zero_info("model.ema_decay: the checkpoint has an averaged policy; this run goes on without it")
            checkpoint["state_dict"] = {name: x for name, x in state.items() if name not in averaged}
        elif self.average is not None and not averaged:
            rank_zero_info("model.ema_decay: the checkpoint has no averaged policy; one begins with its weights")
            names = {id(weight): name for name, weight in self.named_parameters()}
            live = [state[names[id(x)]] for x in self.average.live()]
            state.update({f"{AVERAGE}weights.{i}": x.clone() for i, x in enumerate(live)})

    # What all of them need.

    @property
    def iteration(self) -> int:
        """Number of the iteration under way or just over, from 1, in all runs that one checkpoint continues."""
        return self.trainer.fit_loop.total_batch_idx + 1

    @property
    def weights_version(self) -> int:
        """Version of the weights: how often they have been updated."""
        return int(self.trainer.global_step)

    @property
    def _root(self) -> Path:
        return Path(self.trainer.default_root_dir)

    def _reset(self, *names: str) -> None:
        for name in names:
            cast("ResponseMetrics", self.metrics[name]).reset()
        if REFERENCE in names:
            self._answered = set()

    def _report(self, who: str, split: str) -> PolicyReport:
        return PolicyReport(self._in_order(cast("ResponseMetrics", self.metrics[who]).compute(), split))

    def _in_order(self, records: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
        """Records in the order of the prompts, however they were dealt out; for each, the reference's first."""
        data = cast("Any", self.trainer).datamodule
        rows = data.predict_rows() if split == "predict" else data.prompt_rows(split)
        place = {row["example_id"]: i for i, row in reversed(list(enumerate(rows)))}
        return sorted(records, key=lambda r: (place[r["prompt_id"]], r["policy"] == POLICY, r["response_number"]))

    def _log_figures(self, prefix: str, found: dict[str, float]) -> None:
        for name, value in found.items():
            # The records have already met all processes; the mean over them of equal numbers changes nothing.
            self.log(f"{prefix}/{name}", value, sync_dist=True)

    def _write_course(self, reference: dict[str, float], policy: dict[str, float]) -> None:
        """Add this evaluation to the table and the picture of the run."""
        former = [row for row in self.evaluations if row["policy"] == POLICY and row["iteration"] != self.iteration]
        row = evaluation_row(POLICY, self.iteration, self.trainer.global_step, policy)
        self.evaluations = [evaluation_row(REFERENCE, 0, 0, reference), *former, row]
        self._unwritten = True
        try:
            self.on_train_end()
        except OSError as error:
            told = f"{error.filename}: {error.strerror}"
            rank_zero_warn(f"{told}. The run goes on, and writes this with the next evaluation, or at its end.")

    def on_train_end(self) -> None:
        """Write the course of the run, if there was no room for it before."""
        if self._unwritten:
            write_evaluations(self._root / COURSE, self.evaluations)
            self._draw(PICTURE, "val", self.evaluations)
        self._unwritten = False

    def _draw(self, name: str, split: str, course: Any, test: Any = (), best_of_n: Any = None) -> None:
        path = self._root / name
        figures.overoptimisation(path, course, test, best_of_n)
        log_picture(self.trainer.loggers, f"{split}/overoptimisation", path)
