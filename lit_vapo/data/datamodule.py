"""The datamodules: one set of options for all stages, so that one YAML file serves them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lit_vapo.data.collate import Collator, PromptBatch, pair_labels
from lit_vapo.data.formats import read_preference, read_prompt
from lit_vapo.data.sampler import LengthSampler
from lit_vapo.data.sources import Row, each_row, load_rows
from lit_vapo.data.splits import FeatureRows, Pairs, Rows, set_aside
from lit_vapo.data.tokenise import Truncation, load_text_tokenizer, tokenise_preference, tokenise_prompt
from lit_vapo.types import FeaturePairs, TokenSequence


class TextDataModule(LightningDataModule):
    """What the stages share: where texts come from, how they are split, tokenised and cut.

    Preferences have the columns `chosen` and `rejected`, and `prompt` unless both are whole dialogues that share
    their beginning; texts, or lists of role/content messages that go through the chat template. A number in
    `margin` says by how much a response was preferred. Prompts have the column `prompt`.

    Args:
        tokenizer: Folder or hub name of the tokenizer, usually that of the base model.
        preferences: Files (`.jsonl`, `.parquet`; globs allowed) or hub names (`name`, `name:config`,
            `name:config:split`) of preferences.
        preferences_validation: The same for validation; `null` sets a part of `preferences` aside.
        preferences_test: The same for testing; `null` tests on the validation part.
        prompts: Files or hub names of prompts to respond to; `null` takes those of `preferences`, each once.
        prompts_validation: The same for validation; `null` sets a part of `prompts` aside.
        prompts_test: The same for testing; `null` tests on the validation part.
        validation_fraction: Part set aside where no validation file is given. A row's place depends on its prompt
            alone (on the pair where nearly all prompts are the same), not on the other rows or a seed.
        max_length: Most tokens of prompt and response; the prompt loses its beginning first.
        max_prompt_length: Most tokens of a prompt to respond to; longer ones are an error.
        skip_invalid: Leave out rows that are no preference or prompt (an empty response, two equal ones, a prompt too
            long) and say how many, in place of an error.
        append_eos: End preferred and other responses with the end-of-sequence token.
        batch_size: Pairs of a step in the sft and reward stages, prompts of an iteration in the ppo stage; for each
            process.
        num_workers: Processes that prepare batches.
        seed: Seed of the order of pairs that are batched by length; other orders follow `seed_everything`.
    """

    def __init__(
        self,
        tokenizer: str,
        preferences: str | list[str] | None = None,
        preferences_validation: str | list[str] | None = None,
        preferences_test: str | list[str] | None = None,
        prompts: str | list[str] | None = None,
        prompts_validation: str | list[str] | None = None,
        prompts_test: str | list[str] | None = None,
        validation_fraction: float = 0.1,
        max_length: int = 1024,
        max_prompt_length: int = 512,
        append_eos: bool = True,
        skip_invalid: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction: expected a number from 0 to below 1, got {validation_fraction}"
            )
        for name, value in (("batch_size", batch_size), ("max_prompt_length", max_prompt_length)):
            if value < 1:
                raise ValueError(f"data.{name}: expected at least 1, got {value}")
        if max_length < 2:
            raise ValueError(f"data.max_length: expected at least 2, got {max_length}")
        self.preference_sources = {
            "train": preferences, "val": preferences_validation, "test": preferences_test
        }  # fmt: skip
        self.prompt_sources = {
            "train": prompts or preferences,
            "val": prompts_validation,
            "test": prompts_test,
        }
        self.own_prompts = prompts is not None
        self.validation_fraction = validation_fraction
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.append_eos = append_eos
        self.skip_invalid = skip_invalid
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.text_tokenizer = load_text_tokenizer(tokenizer)
        self.collator = Collator(int(self.text_tokenizer.pad_token_id))
        self._rows: dict[str, dict[str, Rows]] = {}

    # What a split holds.

    def preference_rows(self, split: str) -> Rows:
        """Tokenised preferences of `train`, `val` or `test`."""
        return self._split("preferences", self.preference_sources, self._tokenise_preferences, split)

    def prompt_rows(self, split: str) -> Rows:
        """Tokenised prompts of `train`, `val` or `test`."""
        return self._split("prompts", self.prompt_sources, self._tokenise_prompts, split)

    def preferences(self, split: str) -> Pairs:
        """Both sides of all pairs of a split, in a stable order."""
        rows = self.preference_rows(split)
        return Pairs(
            [TokenSequence(r["chosen_ids"], r["prompt_length"]) for r in rows],
            [TokenSequence(r["rejected_ids"], r["prompt_length"]) for r in rows],
        )

    def longest_pair(self) -> int:
        """Tokens of the longest prompt with its response, in any split."""
        rows = [r for split in ("train", "val", "test") for r in self.preference_rows(split)]
        return max(max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows)

    def prompt_batches(self, split: str, count: int) -> list[PromptBatch]:
        """The first `count` prompts of a split (or all, if there are fewer) in batches."""
        rows = self.prompt_rows(split)[:count]
        return [self.collator.prompts(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]

    def _split(self, name: str, sources: dict[str, Any], tokenise: Callable[[Any, str], Rows], split: str) -> Rows:
        found = self._rows.setdefault(name, {})
        if not found:
            if sources["train"] is None:
                raise ValueError(f"data.{name}: expected files or hub names, got null")
            rows = tokenise(sources["train"], f"data.{name}")
            found["train"], found["val"] = rows, []
            if sources["val"] is not None:
                found["val"] = tokenise(sources["val"], f"data.{name}_validation")
            elif self.validation_fraction:
                found["train"], found["val"] = set_aside(rows, self.validation_fraction)
            found["test"] = found["val"]
            if sources["test"] is not None:
                found["test"] = tokenise(sources["test"], f"data.{name}_test")
            if not found["train"]:
                raise ValueError(f"data.{name}: expected rows to train on, got none outside the validation part")
            counts = ", ".join(f"{len(found[s])} {s}" for s in ("train", "val", "test"))
            rank_zero_info(f"data.{name}: {counts}")
        return found[split]

    def _tokenise_preferences(self, sources: Any, key: str) -> Rows:
        def tokenise(row: Row) -> tuple[dict[str, Any], Truncation]:
            preference = read_preference(row, self.text_tokenizer)
            tokens, cut = tokenise_preference(preference, self.text_tokenizer, self.max_length, self.append_eos)
            if tokens["chosen_ids"] == tokens["rejected_ids"]:
                raise ValueError(
                    f"{row.place}: expected two responses that differ within data.max_length = {self.max_length} "
                    "tokens, got the same tokens"
                )
            return tokens, cut

        found = each_row(load_rows(sources, key), tokenise, key, self.skip_invalid)
        rows = [tokens for tokens, _ in found]
        prompts, responses = sum(cut.prompts for _, cut in found), sum(cut.responses for _, cut in found)
        if prompts or responses:
            rank_zero_warn(
                f"{key}: data.max_length = {self.max_length} cut the beginning off {prompts} prompts and the end off "
                f"{responses} responses, of {len(rows)} pairs"
            )
        return rows

    def _tokenise_prompts(self, sources: Any, key: str) -> Rows:
        def tokenise(row: Row) -> dict[str, Any]:
            prompt = read_prompt(row, self.text_tokenizer)
            return tokenise_prompt(prompt, self.text_tokenizer, self.max_prompt_length, row.place)

        rows = each_row(load_rows(sources, key), tokenise, key, self.skip_invalid)
        # Several pairs may answer one prompt; a file of prompts is taken as it is.
        return rows if self.own_prompts else list({row["prompt"]: row for row in rows}.values())

    # Loaders.

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _loader(self, rows: Any, collate: Callable[..., Any], **kwargs: Any) -> DataLoader[Any]:
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            **kwargs,
        )

    def _pair_loader(self, rows: Rows, collate: Callable[..., Any], train: bool) -> DataLoader[Any]:
        if not train:
            return self._loader(rows, collate)
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        batch_size = self.batch_size * ranks.get("num_replicas", 1)
        lengths = [max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
        return self._loader(rows, collate, sampler=LengthSampler(lengths, batch_size, self.seed, **ranks))


class PreferenceDataModule(TextDataModule):
    """Pairs for the reward stage; options as in `TextDataModule`."""

    def prepare_data(self) -> None:
        """Read and check the data before any model is loaded."""
        self.preference_rows("train")

    streams = False

    def all_pairs(self) -> DataLoader[Any]:
        """All training pairs, in their order and not shared out to processes."""
        features = getattr(self, "_features", {}).get("train")
        if features is not None:
            return self._loader(features, _as_it_is)
        return self._loader(self.preference_rows("train"), self.collator.preferences)

    def use_features(self, split: str, chosen: Tensor, rejected: Tensor) -> None:
        """Serve features (N, H) in place of tokens, in the order of `preferences(split)`."""
        rows = self.preference_rows(split)
        if not len(rows) == len(chosen) == len(rejected):
            raise ValueError(f"expected features of {len(rows)} pairs, got {len(chosen)} and {len(rejected)}")
        if chosen.shape != rejected.shape:
            raise ValueError(f"expected features of one shape, got {tuple(chosen.shape)}, {tuple(rejected.shape)}")
        features = FeatureRows(chosen, rejected, pair_labels(rows))
        self._features = {**getattr(self, "_features", {}), split: features}

    def train_dataloader(self) -> DataLoader[Any]:
        """Pairs to learn from."""
        return self._pairs("train")

    def val_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Pairs set aside."""
        return self._pairs("val")

    def test_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Pairs to test on."""
        return self._pairs("test")

    def _pairs(self, split: str) -> Any:
        rows = self.preference_rows(split)
        if not rows:
            return []
        features = getattr(self, "_features", {}).get(split)
        if features is not None:
            return self._loader(features, _as_it_is, shuffle=split == "train")
        return self._pair_loader(rows, self.collator.preferences, train=split == "train")


class PromptDataModule(TextDataModule):
    """Prompts for the ppo stage; options as in `TextDataModule`."""

    def prepare_data(self) -> None:
        """Read and check the data before any model is loaded."""
        self.prompt_rows("train")

    def train_dataloader(self) -> DataLoader[Any]:
        """Prompts to learn on; an incomplete last batch is left out."""
        rows = self.prompt_rows("train")
        share = len(rows) // self._world_size
        if share < self.batch_size:
            raise ValueError(f"data.batch_size: expected at most the {share} prompts there are, got {self.batch_size}")
        return self._loader(rows, self.collator.prompts, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Prompts set aside."""
        rows = self.prompt_rows("val")
        return self._loader(rows, self.collator.prompts) if rows else []

    def test_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Prompts to test on."""
        rows = self.prompt_rows("test")
        return self._loader(rows, self.collator.prompts) if rows else []

    def predict_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Prompts to respond to: those of the test."""
        return self.test_dataloader()


class SFTDataModule(TextDataModule):
    """Preferred responses to imitate, for the sft stage; options as in `TextDataModule`."""

    def prepare_data(self) -> None:
        """Read and check the data before any model is loaded."""
        self.preference_rows("train")

    def train_dataloader(self) -> DataLoader[Any]:
        """Responses to imitate."""
        return self._pair_loader(self.preference_rows("train"), self.collator.sft, train=True)

    def val_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Responses set aside."""
        rows = self.preference_rows("val")
        return self._pair_loader(rows, self.collator.sft, train=False) if rows else []

    def test_dataloader(self) -> DataLoader[Any] | Iterable[Any]:
        """Responses to test on."""
        rows = self.preference_rows("test")
        return self._pair_loader(rows, self.collator.sft, train=False) if rows else []


def _as_it_is(batch: FeaturePairs) -> FeaturePairs:
    return batch
