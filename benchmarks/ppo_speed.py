"""How long an iteration takes: against TRL 1.12.0's PPO, RLOO and GRPO, and by phase against this machine's floors.

    python -m venv peer && peer/bin/pip install -c constraints-cpu.txt trl==1.12.0 peft requests
    python benchmarks/ppo_speed.py --peer_python peer/bin/python
    python benchmarks/ppo_speed.py --peer_python peer/bin/python --model FOLDER --epochs 2

Ours is variance-aware PPO with ten reward heads, TRL's has one reward model. Equal on both sides: policy, prompts,
batch, lengths, temperature, learning rate, adapters, data type, one thread, and the number of times the weights change,
which is counted. Not equal, because that is how each is built: TRL trains a critic of its own beside the policy; ours,
by default, reads hidden states of the reference. One side of ours has a critic as TRL's.

RLOO and GRPO have no critic; both sides draw four responses to each prompt, and as many responses in all. Penalties
stand where each puts them: in the reward, but for TRL's GRPO, whose is a term of the loss. TRL's RLOO clips ratios of
whole responses, ours those of tokens: what they learn in so few steps is not to be compared.

The reward counts good words less bad ones, and the table says how much each side's rose: a fast iteration that learns
nothing is worth nothing. Every run has a process of its own; the sides alternate, and ratios are taken pair by pair.
Times are processor times of whole iterations, the first left out.

The floor of a phase is the larger of two: its floating-point operations at the rate of a large matrix product, and the
bytes of weights that it has to read at the speed of a copy. Both are measured here, in one thread. Counted are
operations that nobody can leave out: each token of a prompt and a response once through the blocks for each pass, the
head for response tokens, and on the way back gradients of states alone, since the base is frozen. Adapters count where
they train, there and back; anywhere else they could be added to the weights. It counts a percent or so too much: the
first block needs no gradient of its states, and the last one little of a prompt.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jsonargparse import auto_cli

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "workers")]

from job import start  # noqa: E402
from ppo_job import Answer, Job  # noqa: E402
from ppo_task import train_heads, write_rows  # noqa: E402
from reward_uq import WORDS, make_model, spread, write_pairs  # noqa: E402

from lit_vapo.folders import claim_folder, new_folder  # noqa: E402
from lit_vapo.models.pretrained import Pretrained, load_causal_lm  # noqa: E402
from lit_vapo.models.weights import quiet  # noqa: E402

RANK = 16
# Responses to each prompt where there is no critic.
GROUP = 4


@dataclass(frozen=True)
class Side:
    """One way to run PPO.

    Args:
        label: What tables call it.
        worker: The script that runs it.
        lora_rank: Rank of the adapters that train; all weights train without.
        critic: Ours alone.
        advantage: `gae`, `rloo` or `grpo`.
    """

    label: str
    worker: str = "ppo_ours.py"
    lora_rank: int | None = RANK
    critic: str = "reference"
    advantage: str = "gae"

    @property
    def is_peer(self) -> bool:
        """Whether it is not ours."""
        return self.worker != "ppo_ours.py"


SIDES = {
    "trl": Side("TRL, all weights", "ppo_trl.py", None),
    "trl_lora": Side("TRL, adapters", "ppo_trl.py"),
    "ours": Side("ours, adapters"),
    "ours_whole": Side("ours, all weights", lora_rank=None),
    "ours_own": Side("ours, all weights, a critic of its own", lora_rank=None, critic="own"),
    "trl_rloo": Side("TRL, RLOO, adapters", "group_trl.py", advantage="rloo"),
    "ours_rloo": Side("ours, RLOO, adapters", advantage="rloo"),
    "trl_grpo": Side("TRL, GRPO, adapters", "group_trl.py", advantage="grpo"),
    "ours_grpo": Side("ours, GRPO, adapters", advantage="grpo"),
}


def best_of(work: Callable[[], object], repetitions: int = 7) -> float:
    """Seconds of the fastest run: a floor is what the machine can do."""
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@dataclass(frozen=True)
class Machine:
    """What one thread of this machine can do.

    Attributes:
        rate: Floating-point operations per second of a large matrix product.
        bandwidth: Bytes per second that a copy reads and writes.
    """

    rate: float
    bandwidth: float

    @classmethod
    def measured(cls, dtype: torch.dtype, width: int) -> Machine:
        """With products of this width."""
        x, weight = torch.randn(1024, width, dtype=dtype), torch.randn(width, 4 * width, dtype=dtype)
        large = torch.empty(2**26, dtype=torch.uint8)
        rate = 2 * 1024 * width * 4 * width / best_of(lambda: x @ weight)
        return cls(rate, 2 * len(large) / best_of(large.clone))


def floors(model: Path, dtype: torch.dtype, job: Job, tokens: float) -> dict[str, float]:
    """Seconds that each phase of an iteration with adapters cannot do without.

    Args:
        model: The policy.
        dtype: Of its weights.
        job: The shape of the run.
        tokens: Response tokens of an iteration.
    """
    lm = load_causal_lm(Pretrained(str(model), dtype=job.dtype))  # type: ignore[arg-type]
    head = lm.get_output_embeddings().weight.numel()
    blocks = sum(p.numel() for p in lm.base_model.layers.parameters())
    adapted = [m for m in lm.base_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    adapters = sum(RANK * (m.in_features + m.out_features) for m in adapted)
    machine = Machine.measured(dtype, lm.config.hidden_size)
    prompts = job.batch_size * job.max_prompt_length
    every = prompts + tokens
    steps = tokens / job.batch_size
    size = torch.finfo(dtype).bits // 8
    print(
        f"this machine, one thread: {machine.rate / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s; blocks of "
        f"{blocks / 1e6:.1f} M weights, a head of {head / 1e6:.1f} M, adapters of {adapters / 1e6:.1f} M"
    )

    def floor(operations: float, weights: float) -> float:
        return max(operations / machine.rate, weights * size / machine.bandwidth)

    step = floor(2 * (blocks + head) * job.batch_size, blocks + head)
    read = floor(2 * blocks * prompts, blocks)
    scoring = floor(2 * blocks * every + 2 * head * tokens, blocks + head)
    # There and back; of the head as well, whose way back goes through the states. Adapters have gradients themselves.
    passes = floor((4 * blocks + 6 * adapters) * every + 4 * head * tokens, 2 * (blocks + head))
    # Where sampling tells the policy's log-probabilities, the reference alone is left to be read.
    read_again = 1 if dtype == torch.float32 else 2
    return {"generate": read + steps * step, "score": read_again * scoring, "update": job.epochs * passes}


def prompts(path: Path, count: int, shortest: int, longest: int) -> str:
    """Prompts of so many words."""
    rng = random.Random(1)
    texts = (" ".join(rng.choices(WORDS, k=rng.randint(shortest, longest))) for _ in range(count))
    return write_rows(path, [{"prompt": text} for text in texts])


def main(
    peer_python: str | None = None,
    work: str = "runs/ppo_speed",
    model: str | None = None,
    pairs: int = 5,
    iterations: int = 4,
    batch_size: int = 16,
    prompt_length: int = 25,
    shortest_prompt: int | None = None,
    response_length: int = 32,
    epochs: int = 4,
    minibatches: int = 4,
    learning_rate: float = 1e-3,
    members: int = 10,
    dtype: str = "float32",
    sides: list[str] = list(SIDES),  # noqa: B006
) -> None:
    """Print the tables.

    Args:
        peer_python: Interpreter of an environment with TRL; `null` leaves the peer out.
        work: Folder for models, runs and `answers.json`; what is there is used again, and that of other options
            refused.
        model: Folder of the policy; `null` makes a Llama of 6.3 million random parameters.
        pairs: Runs of each side; ratios are taken pair by pair.
        iterations: Iterations of a run.
        batch_size: Responses of an iteration.
        prompt_length: Most words of a prompt.
        shortest_prompt: Fewest; `null` for as many.
        response_length: Most tokens of a response.
        epochs: Passes over a rollout.
        minibatches: Weight updates of a pass.
        learning_rate: Of policy and critic.
        members: Reward heads of ours.
        dtype: Of frozen weights, on both sides.
        sides: Which to run; those of the peer are left out without one.
    """
    quiet()
    torch.set_num_threads(1)
    root = Path(work)
    root.mkdir(parents=True, exist_ok=True)
    shape = (iterations, batch_size, prompt_length, response_length, epochs, minibatches, learning_rate, 0.05)
    claim_folder(root, "--work", {"model": model, "shape": list(shape), "members": members, "dtype": dtype})
    policy = root / "policy" if model is None else Path(model)
    if not policy.is_dir():
        with new_folder(policy, "--work") as partial:
            make_model(partial)
    asked = prompts(root / "prompts.jsonl", iterations * batch_size, shortest_prompt or prompt_length, prompt_length)
    preferences = root / "preferences.jsonl"
    write_pairs(preferences, 64)
    rewards = {count: root / f"reward_{count}" for count in (1, members)}
    for count, folder in rewards.items():
        if not folder.is_dir():
            with new_folder(folder, "--work") as partial:
                train_heads(partial, policy, str(preferences), 0, count, 128, response_length)
    job = Job(
        str(policy), f"{rewards[members]}/ensemble", f"{rewards[1]}/classifier", asked, "", [], *shape,
        objective="VarianceAware", dtype=dtype,
    )  # fmt: skip
    answers: dict[str, list[Answer]] = {}
    for pair in range(pairs):
        for side in sides[:: -1 if pair % 2 else 1]:
            about = SIDES[side]
            python = peer_python if about.is_peer else sys.executable
            if python is None:
                continue
            output = root / f"{side}_{pair}"
            output.mkdir(exist_ok=True)
            own = {"critic": about.critic, "lora_rank": about.lora_rank, "advantage": about.advantage}
            responses = 1 if about.advantage == "gae" else GROUP
            one = replace(job, output=str(output), seed=pair, responses=responses, **own)
            answer = Answer(**start(python, about.worker, one, output, threads=1))
            if answer.updates != iterations * epochs * minibatches:
                raise SystemExit(f"{about.label}: {iterations * epochs * minibatches} updates, got {answer.updates}")
            answers.setdefault(side, []).append(answer)
            record = {name: [asdict(run) for run in runs] for name, runs in answers.items()}
            (root / "answers.json").write_text(json.dumps(record, indent=1))
            print(f"{about.label}: {statistics.median(answer.seconds[1:]):.3g} s, {answer.peak_mb:.0f} MB", flush=True)
    table(answers)
    if "ours" in answers:
        by_phase(answers["ours"], policy, job)


def _answers(peer: Side, side: Side, rank: int | None) -> bool:
    """Whether a side is the peer's with adapters of this rank, and estimates advantages as another."""
    return peer.is_peer and (peer.advantage, peer.lora_rank) == (side.advantage, rank)


def table(answers: dict[str, list[Answer]]) -> None:
    """Processor seconds of an iteration, memory, what was learned; and TRL's over ours."""
    print("\n| side | s an iteration | times TRL's speed, all weights | times TRL's speed, adapters | MB | reward |")
    print("| --- | --- | --- | --- | --- | --- |")
    seconds = {side: [statistics.median(a.seconds[1:]) for a in runs] for side, runs in answers.items()}
    for side, runs in answers.items():
        about = SIDES[side]
        cells = [spread(seconds[side])]
        for rank in (None, RANK):
            peer = next((s for s in seconds if _answers(SIDES[s], about, rank)), None)
            there = peer is not None and not about.is_peer
            ratios = [b / a for a, b in zip(seconds[side], seconds[peer], strict=True)] if there else []
            cells.append(spread(ratios) if there else "")
        rose = statistics.median(a.rewards[-1] - a.rewards[0] for a in runs)
        cells += [spread([a.peak_mb for a in runs], 0), f"{rose:+.2f}"]
        print(f"| {SIDES[side].label} | {' | '.join(cells)} |", flush=True)


def by_phase(runs: list[Answer], model: Path, job: Job) -> None:
    """Seconds of each phase, its floor, and how many times that it takes."""
    tokens = statistics.median(x for run in runs for x in run.tokens[1:])
    lowest = floors(model, getattr(torch, job.dtype), job, tokens)
    print("\n| phase | s | floor, s | times its floor |\n| --- | --- | --- | --- |")
    for phase, floor in lowest.items():
        taken = statistics.median(x for run in runs for x in run.phases[phase][1:])
        print(f"| {phase} | {taken:.2f} | {floor:.2f} | {taken / floor:.2f} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
