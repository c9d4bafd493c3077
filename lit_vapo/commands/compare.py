"""`lit-vapo compare`: two policies answer the same prompts, side by side and by what rewards say of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lit_vapo.commands.options import Parser
from lit_vapo.commands.sources import chosen_source, device_of, opinions, ready, warn_of_units
from lit_vapo.commands.voices import POLICY, check_voice, exported, find_voices, opinion, plain
from lit_vapo.data.collate import Collator
from lit_vapo.data.columns import Columns
from lit_vapo.data.encoder import Encoder
from lit_vapo.data.readers import PromptReader
from lit_vapo.data.row import attempt
from lit_vapo.data.sources import iterate_rows
from lit_vapo.evaluation.policy_report import PolicyReport, compare
from lit_vapo.folders import write_whole
from lit_vapo.functional.intervals import share_interval
from lit_vapo.models.generation import Sampling
from lit_vapo.models.weights import quiet
from lit_vapo.rewards import Responses, RewardSource
from lit_vapo.rollout import sampled_responses
from lit_vapo.stages.seeding import seeded

# What the two are called in tables; how many prompts are shown with their answers, and how much of each prompt.
WHO, SHOWN, LONGEST = ("A", "B"), 3, 200
# No prompt is too long to be answered once.
ANY_LENGTH = 2**31
Records = list[dict[str, Any]]


def compare_policies(
    policies: tuple[str, str],
    prompts: str,
    reward: RewardSource | str | None = None,
    ensemble: str | None = None,
    num_prompts: int = 100,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 16,
    output: str | None = None,
    columns: dict[str, str | None] | None = None,
    quantization: str | None = None,
    trust: list[str] | None = None,
) -> None:
    """Let two policies answer the same prompts: their answers side by side, and which of them rewards prefer.

    Both draw from the same seed. With rewards, each has its mean reward ± σ, and the first its win rate over the second
    (ties count half) with a 95% interval over prompts.

    Args:
        policies: Folders of two exported policies or runs (their last checkpoints), or language models of transformers.
        prompts: A file, a glob or a hub name, as `data.prompts`; each prompt counts once.
        reward: Folder of an ensemble or of public reward models, or a source of rewards; `null` for none.
        ensemble: Another name of `reward`, for a folder.
        num_prompts: Most prompts; the first are taken.
        sampling: How answers are drawn; `num_responses` of them to each prompt.
        seed: Seed of the answers.
        batch_size: Prompts that are answered at once.
        output: A file for all answers, a line of JSON each.
        columns: As `data.columns`.
        quantization: `8bit` or `4bit` for the bases of adapters, or for whole models.
        trust: Code outside of lit_vapo that the folders may run: classes by their Python name, models that bring code
            by folder or hub name.

    Raises:
        ValueError: There is no such policy, file or source of rewards, or a number is out of its range.
    """
    for name, number in (("num_prompts", num_prompts), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"--{name}: expected at least 1, got {number}")
    for policy in policies:
        check_voice(policy)
    source = None if reward is None and ensemble is None else chosen_source(reward, ensemble, trust)
    sampling = sampling or Sampling(256)
    found = []
    for policy in policies:
        with exported(policy, trust) as folder:
            tokenizer, voices = find_voices(folder, None, quantization, reference=False)
        rows = _read(prompts, tokenizer, Columns(columns), num_prompts)
        batches = [Collator().prompts(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        with voices[POLICY]() as lm, seeded(seed):
            answered = sampled_responses(lm, tokenizer, batches, sampling, POLICY)
        if source is not None:
            answered.columns = _columns(source.columns, rows, sampling.num_responses)
        found.append((rows, answered))
        # The next one has the memory for itself.
        del voices, lm
    if source is not None:
        source = ready(source, device_of())
        warn_of_units(source)
    both = [_records(name, *one, source) for name, one in zip(policies, found, strict=True)]
    if output is not None:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for records in both for record in records)
        write_whole(Path(output), "".join(lines))
    names = [f"{who}: {policy}" for who, policy in zip(WHO, policies, strict=True)]
    _print(_samples(names, both))
    table, verdict = _figures(both)
    each = "one answer" if sampling.num_responses == 1 else f"{sampling.num_responses} answers"
    print(f"{len(rows)} prompts, {each} to each, drawn from seed {seed}\n")
    _print(table)
    if verdict:
        print(f"\n{verdict}")
    if output is not None:
        print(f"all answers: {output}")


def _read(prompts: str, tokenizer: Any, columns: Columns, count: int) -> list[dict[str, Any]]:
    """The first prompts of a file, each once.

    Raises:
        ValueError: There is no such file, or a row is no prompt.
    """
    reader = PromptReader(Encoder(tokenizer), ANY_LENGTH, columns.implicit)
    found: dict[str, dict[str, Any]] = {}
    for row in iterate_rows(prompts, "--prompts", columns):
        question = attempt(reader.read, row)
        found.setdefault(question["identity"], question)
        if len(found) == count:
            break
    return list(found.values())


def _columns(names: Iterable[str], rows: Sequence[dict[str, Any]], each: int) -> dict[str, list[Any]]:
    """Columns that rewards are computed from, a value for each response.

    Raises:
        ValueError: A row lacks one.
    """
    for row in rows:
        if absent := [name for name in names if name not in row["columns"]]:
            raise ValueError(f"{row['place']}: expected a column {absent[0]!r}, which the reward is computed from")
    return {name: [row["columns"][name] for row in rows for _ in range(each)] for name in names}


def _records(policy: str, rows: Sequence[dict[str, Any]], answered: Responses, source: RewardSource | None) -> Records:
    """A record for each response, as `test/responses.jsonl` of a run has them."""
    assert answered.rows is not None
    each, lengths = len(answered) // len(rows), answered.rows.response_mask.sum(1).tolist()
    found: Records = [{}] * len(answered) if source is None else opinions(source, answered)
    return [
        {
            "policy": policy,
            "prompt_id": rows[i // each]["example_id"],
            "response_number": i % each,
            "prompt": rows[i // each]["prompt"],
            "response": text,
            **found[i],
            "stopped": bool(answered.finished[i]),
            "length": lengths[i],
        }
        for i, text in enumerate(answered.texts)
    ]


def _samples(names: Sequence[str], both: Sequence[Records]) -> Table:
    """Answers to the first prompts, side by side."""
    table = Table("prompt", *(Column(Text(name)) for name in names), box=None, padding=(0, 2, 1, 0))
    for prompt_id in list(dict.fromkeys(record["prompt_id"] for record in both[0]))[:SHOWN]:
        given = [[record for record in records if record["prompt_id"] == prompt_id] for records in both]
        prompt = plain(given[0][0]["prompt"]).strip()
        asked = prompt if len(prompt) <= LONGEST else f"…{prompt[-LONGEST:]}"
        table.add_row(Text(asked), *(Text("\n".join(map(_shown, records))) for records in given))
    return table


def _shown(record: dict[str, Any]) -> str:
    said = f"{opinion(record['reward'], record['sigma'])} " if "reward" in record else ""
    return said + plain(record["response"]).strip()


def _figures(both: Sequence[Records]) -> tuple[Table, str]:
    """The means of each over all its answers; and how often the first is better, if rewards say."""
    table = Table("", *WHO, box=None, padding=(0, 2, 0, 0))
    table.add_row("tokens of an answer", *(f"{fmean(r['length'] for r in records):.1f}" for records in both))
    table.add_row("ended by themselves", *(f"{fmean(r['stopped'] for r in records):.0%}" for records in both))
    if "reward" not in both[0][0]:
        return table, ""
    silent = {r["prompt_id"] for records in both for r in records if r["reward"] is None}
    judged = [[r for r in records if r["prompt_id"] not in silent] for records in both]
    if not judged[0]:
        return table, "The rewards say nothing of these answers."
    first, second = map(PolicyReport, judged)
    table.add_row("mean reward ± σ", *map(_mean, (first, second)))
    found = compare(first, second)
    low, high = share_interval(found["reward_win_rate"], first.num_prompts)
    said = (
        f"A's win rate over B is {found['reward_win_rate']:.0%} (95% interval {low:.0%} … {high:.0%}). Its gain is "
        f"{found['reward_gain']:+.2f}, with a standard error of {found['reward_gain_se']:.2f}."
    )
    return table, said + f" {len(silent)} prompts are left out: their answers have no reward." * bool(silent)


def _mean(report: PolicyReport) -> str:
    sigma = report.columns.get("sigma")
    return opinion(float(report.columns["reward"].mean()), None if sigma is None else float(sigma.mean())).strip("[]")


def _print(table: Table) -> None:
    """Print a table as wide as the terminal; elsewhere it is plain text."""
    console = Console(width=shutil.get_terminal_size((100, 24)).columns, highlight=False)
    with console.capture() as written:
        console.print(table)
    print("\n".join(line.rstrip() for line in written.get().splitlines()))


def main(words: Sequence[str]) -> None:
    """Parse a command line without `lit-vapo compare`, and run."""
    quiet()
    parser = Parser(prog="lit-vapo compare", description=(compare_policies.__doc__ or "").partition("\n\n")[0])
    about = "Folder of an exported policy or of a run (its last checkpoint), or any language model."
    names = [f"policy{number}" for number in range(1, len(WHO) + 1)]
    for name in names:
        parser.add_argument(name, type=str, help=about)
    parser.add_function_arguments(compare_policies, skip={"policies"}, as_group=False)
    given = parser.instantiate_classes(parser.parse_args(list(words))).as_dict()
    compare_policies((given.pop(names[0]), given.pop(names[1])), **given)
