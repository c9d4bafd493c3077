"""The datamodules: one set of options for all stages, so that one YAML file serves them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lit_vapo.data.collate import Collator, pair_labels
from lit_vapo.data.columns import Columns
from lit_vapo.data.loaders import TextLoaders
from lit_vapo.data.mixing import Sources
from lit_vapo.data.readers import PairReader, PromptReader, load_encoder
from lit_vapo.data.splits import FeatureRows, Rows, check_fractions, check_preferred, check_streaming, prefers
from lit_vapo.ranges import Fraction, NonNegativeInt, PositiveInt, TwoOrMore, check_ranges
from lit_vapo.types import FeaturePairs


class TextDataModule(TextLoaders, LightningDataModule):
    """What the stages share: where texts come from, how they are split, tokenised and cut.

    Preferences have the columns `chosen` and `rejected`, and `prompt` unless both are whole dialogues that share
    their beginning; texts, or lists of role/content messages that go through the chat template. Prompts have the
    column `prompt`. docs/data.md shows all shapes, and the columns that say how clear a preference is.

    Args:
        tokenizer: Folder or hub name of the tokenizer; in a run of the command line `null` takes that of `model.base`.
        preferences: Files (`.jsonl`, `.json`, `.parquet`; globs allowed) or hub names (`name`, `name:config`,
            `name:config:split`) of preferences. A mapping from these to ratios mixes them: as many rows as can be had
            in these shares without taking one twice.
        preferences_validation: The same for validation; `null` sets a part of `preferences` aside.
        preferences_test: The same for testing; `null` sets the part `test_fraction` of `preferences` aside, or tests
            on the validation part if that is 0.
        preferences_ood: The same from elsewhere, to test the ensemble where it was not trained.
        prompts: Files or hub names of prompts to respond to; `null` takes those of `preferences`, each once.
        prompts_validation: The same for validation; `null` sets a part of `prompts` aside.
        prompts_test: The same for testing; `null` is as in `preferences_test`.
        validation_fraction: Part set aside where no validation file is given. A row's place depends on its prompt
            alone (on the pair where nearly all prompts are the same), not on the other rows or a seed.
        test_fraction: Part set aside in the same way where no test file is given.
        streaming: Read `preferences` as they are needed instead of holding them; for sets larger than memory.
            Nothing can be set aside from a stream: it takes a `preferences_validation` or a `validation_fraction` of
            0, and an end of the run in `trainer.max_steps`.
        stream_buffer: Pairs held to shuffle a stream, in each process that prepares batches.
        max_length: Most tokens of prompt and response; the prompt loses its beginning first.
        max_prompt_length: Most tokens of a prompt to respond to; longer ones are an error.
        skip_invalid: Leave out whatever is wrong with a row and say how many, in place of an error. Rows that are well
            written and of no use (an empty response, two equal ones, a prompt too long) are always left out, unless
            they are more than half.
        sample: Read at most so many rows of each kind of data, for a trial; the same ones in every run.
        columns: Our name of a column to the files' (`{prompt: question}`), where they differ. `{prompt: null}`: the
            prompt of a pair is what its two responses begin with. `null` for another name leaves that column out.
        append_eos: End responses that have no end with the end-of-sequence token.
        templated: Texts are written in the model's chat template already, so that control tokens in them act. Otherwise
            their names are ordinary text.
        chat_template_kwargs: Arguments of the chat template, such as `{enable_thinking: false}`.
        stop_token_ids: Tokens that end a response, besides those that the model's configuration names.
        trust_remote_code: Let code run that lies beside the tokenizer.
        batch_size: Pairs of a step in the sft and reward stages, prompts of an iteration in the ppo stage; for each
            process.
        num_workers: Processes that prepare batches.
        seed: Seed of the orders of pairs and prompts; `null` takes that of `seed_everything`.
    """

    inform = staticmethod(rank_zero_info)
    warn = staticmethod(rank_zero_warn)

    def __init__(
        self,
        tokenizer: str | None = None,
        preferences: Sources | None = None,
        preferences_validation: Sources | None = None,
        preferences_test: Sources | None = None,
        preferences_ood: Sources | None = None,
        prompts: Sources | None = None,
        prompts_validation: Sources | None = None,
        prompts_test: Sources | None = None,
        validation_fraction: Fraction = 0.1,
        test_fraction: Fraction = 0.0,
        streaming: bool = False,
        stream_buffer: int = 10_000,
        max_length: TwoOrMore = 1024,
        max_prompt_length: PositiveInt = 512,
        append_eos: bool = True,
        templated: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        stop_token_ids: list[int] | None = None,
        trust_remote_code: bool = False,
        skip_invalid: bool = False,
        sample: PositiveInt | None = None,
        columns: dict[str, str | None] | None = None,
        batch_size: PositiveInt = 32,
        num_workers: NonNegativeInt = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_ranges(TextDataModule, locals(), "data.")
        check_fractions(validation_fraction, test_fraction)
        self.preference_sources = {
            "train": preferences,
            "val": preferences_validation,
            "test": preferences_test,
            "ood": preferences_ood,
        }
        self.prompt_sources = {"train": prompts or preferences, "val": prompts_validation, "test": prompts_test}
        if streaming:
            check_streaming(
                self.preference_sources, validation_fraction, test_fraction, stream_buffer, batch_size, sample
            )
        self.own_prompts = prompts is not None
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.streaming = streaming
        self.stream_buffer = stream_buffer
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.skip_invalid = skip_invalid
        self.sample = sample
        self.columns = Columns(columns)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        if tokenizer is None:
            raise ValueError("data.tokenizer: expected a folder or hub name, got null, and no model to take it from")
        self.encoder = load_encoder(
            tokenizer, append_eos, templated, chat_template_kwargs, stop_token_ids, trust_remote_code
        )
        self.text_tokenizer = self.encoder.tokenizer
        self.collator = Collator()
        self._pair_reader = PairReader(self.encoder, max_length, self.columns.implicit)
        self._prompt_reader = PromptReader(self.encoder, max_prompt_length, self.columns.implicit)
        self._rows = {}
        self._feature_source: Callable[[str], tuple[Tensor, Tensor]] | None = None
        self._features: dict[str, FeatureRows] = {}


class PreferenceDataModule(TextDataModule):
    """Pairs for the reward stage; options as in `TextDataModule`."""

    def prepare_data(self) -> None:
        """Read and check the data before any model is loaded."""
        self._prepare_preferences()
        if not self.streams:
            check_preferred(any(map(prefers, self.preference_rows("train"))), "data.preferences")

    def all_pairs(self) -> DataLoader[Any]:
        """All training pairs, in their order and not shared out to processes."""
        if self.streams:
            stream = self.stream(shuffle=False)
            return DataLoader(stream, batch_size=self.batch_size, collate_fn=self.collator.preferences)
        features = self._feature_rows("train")
        if features is not None:
            return self._held_out(features, _as_it_is)
        return self._held_out(self.preference_rows("train"), self.collator.preferences)

    def use_features(self, split: str, chosen: Tensor, rejected: Tensor) -> None:
        """Serve features, (N, H) or (N, K, H), in place of tokens, in the order of `preferences(split)`."""
        rows = self.preference_rows(split)
        if not len(rows) == len(chosen) == len(rejected):
            raise ValueError(f"expected features of {len(rows)} pairs, got {len(chosen)} and {len(rejected)}")
        if chosen.shape != rejected.shape:
            raise ValueError(f"expected features of one shape, got {tuple(chosen.shape)}, {tuple(rejected.shape)}")
        self._features[split] = FeatureRows(chosen, rejected, pair_labels(rows))

    def ask_for_features(self, source: Callable[[str], tuple[Tensor, Tensor]]) -> None:
        """Take features of a split from `source` when its batches are first asked for."""
        self._feature_source, self._features = source, {}

    def _feature_rows(self, split: str) -> FeatureRows | None:
        if split not in self._features and self._feature_source is not None:
            self.use_features(split, *self._feature_source(split))
        return self._features.get(split)

    def train_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Pairs to learn from."""
        features = self._feature_rows("train")
        if features is None:
            return self._training_pairs(self.collator.preferences)
        return self._shuffled(features, _as_it_is)

    def val_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Pairs set aside."""
        return self._pairs("val")

    def test_splits(self) -> list[str]:
        """The splits that a test serves, in the order of its loaders: those of `test`, `val` and `ood` with rows.

        Where validation pairs stand in for a test, they are no held-out part besides.
        """
        stands_in = self.preference_rows("test") is self.preference_rows("val")
        served = ("test", "ood") if stands_in else ("test", "val", "ood")
        return [split for split in served if self.preference_rows(split)]

    def test_dataloader(self) -> dict[str, DataLoader[Any]]:
        """Pairs to test on, the held-out ones to calibrate on, and those from elsewhere."""
        return {split: self._pairs(split) for split in self.test_splits()}

    def _pairs(self, split: str) -> Any:
        rows = self.preference_rows(split)
        if not rows:
            return []
        features = self._feature_rows(split)
        if features is not None:
            return self._held_out(features, _as_it_is)
        return self._held_out(rows, self.collator.preferences)


class PromptDataModule(TextDataModule):
    """Prompts for the ppo stage; options as in `TextDataModule`."""

    @property
    def streams(self) -> bool:
        """Prompts to train on are held."""
        return False

    def prepare_data(self) -> None:
        """Read and check the data before any model is loaded."""
        self.prompt_rows("train")

    def check_columns(self, wanted: Iterable[str]) -> None:
        """Refuse prompts that lack a column which rewards are computed from.

        Raises:
            ValueError: A row has no such column; the message names it, the row and the columns there are.
        """
        names = tuple(wanted)
        splits = ("val", "test") if self._prompts_stream else ("train", "val", "test")
        for row in (row for split in splits if names for row in self.prompt_rows(split)):
            missing = next((name for name in names if name not in row["columns"]), None)
            if missing is not None:
                there = ", ".join(sorted(row["columns"])) or "none"
                raise ValueError(
                    f"{row['place']}: expected a column {missing!r} with a value that JSON has, since the reward is "
                    f"computed from it, got {there} besides the prompt"
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Prompts to learn on; an incomplete last batch is left out."""
        rows = self.prompt_rows("train")
        share = len(rows) // self._world_size
        if share < self.batch_size:
            each = f" for each of {self._world_size} processes, of {len(rows)}" if self._world_size > 1 else ""
            raise ValueError(
                f"data.batch_size: expected at most the {share} prompts there are{each}, got {self.batch_size}"
            )
        return self._shuffled(rows, self.collator.prompts, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Prompts set aside."""
        rows = self.prompt_rows("val")
        return self._held_out(rows, self.collator.prompts) if rows else []

    def test_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Prompts to test on."""
        rows = self.prompt_rows("test")
        return self._held_out(rows, self.collator.prompts) if rows else []

    def predict_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Prompts to respond to."""
        rows = self.predict_rows()
        return self._held_out(rows, self.collator.prompts) if rows else []

    def predict_rows(self) -> Rows:
        """The prompts of `prompts_test`, or else all of `prompts`, those to learn on first."""
        if self.prompt_sources["test"] or self._prompts_stream:
            return self.prompt_rows("test")
        train, val, test = (self.prompt_rows(split) for split in ("train", "val", "test"))
        # Validation prompts may come from elsewhere, and may stand in for a test.
        return [*train, *([] if self.prompt_sources["val"] else val), *([] if test is val else test)]


class SFTDataModule(TextDataModule):
    """Preferred responses to imitate, for the sft stage; options as in `TextDataModule`."""

    def prepare_data(self) -> None:
        """Read and check the data before any model is loaded."""
        self._prepare_preferences()

    def train_dataloader(self) -> DataLoader[Any]:
        """Responses to imitate."""
        return self._training_pairs(self.collator.sft)

    def val_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Responses set aside."""
        rows = self.preference_rows("val")
        return self._held_out(rows, self.collator.sft) if rows else []

    def test_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Responses to test on."""
        rows = self.preference_rows("test")
        return self._held_out(rows, self.collator.sft) if rows else []


def _as_it_is(batch: FeaturePairs) -> FeaturePairs:
    return batch
