"""What to turn where a run has no more memory."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from types import FrameType
from typing import Any

# torch has a class of its own for one of the ways in which memory runs out; the others are told by their words.
NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
# Of the system's words, so many characters are shown.
LONGEST = 160
TRAINING = "two values together leave the size of a step as it is"
# The keys of each stage, what helps most first, and what each does.
KEYS = {
    "sft": {
        "data.batch_size": f"lower it, and raise trainer.accumulate_grad_batches likewise: {TRAINING}",
        "data.max_length": "shorter conversations; longer ones are cut",
        "model.lora": "train an adapter, not the whole model",
        "model.base.quantization": "8bit or 4bit hold the base in less memory (with model.lora)",
    },
    "reward": {
        "data.batch_size": f"lower it, and raise trainer.accumulate_grad_batches likewise: {TRAINING}",
        "data.max_length": "shorter conversations; longer ones are cut",
        "model.head.top_layers": "adapt only the topmost blocks (LoraEnsemble)",
        "model.member": "train one member at a time, and put them together by `lit-vapo reward join`",
        "model.head.num_members": "fewer members",
        "model.freeze_backbone": "true trains heads on features that are computed once",
        "model.base.quantization": "8bit or 4bit hold the base in less memory",
    },
    "ppo": {
        "model.update.micro_batch_tokens": "fewer tokens in one pass; it changes no result",
        "data.batch_size": "fewer prompts that are answered at once",
        "model.sampling.max_new_tokens": "shorter responses",
        "model.base.quantization": "8bit or 4bit hold the base in less memory (with model.lora)",
        "model.lora": "train an adapter: the policy, its reference and the critic then share one base",
    },
}
LOADING, OPTIMISER, WRITING = "the loading of models", "a step of the optimiser", "the writing of responses"
SCORING, ROLLOUT = "the scoring of responses", "a rollout"
# Where a run was, by the module and the function of a frame; the innermost frame that fits counts.
PHASES = (
    ("torch.optim", "", OPTIMISER),
    ("torch.autograd", "backward", "a backward pass"),
    ("lit_vapo.models.transformers_generator", "", WRITING),
    ("lit_vapo.rewards", "", SCORING),
    ("lit_vapo.stages.ppo.update", "", "an update"),
    ("lit_vapo.rollout", "", ROLLOUT),
    ("", "configure_model", LOADING),
    ("", "training_step", "a training step"),
    ("", "validation_step", "a validation step"),
    ("", "test_step", "a test step"),
    ("", "predict_step", "a prediction step"),
    ("", "instantiate_classes", "the start"),
)
# What the size of a batch has no part in, and what an update alone has.
UNBATCHED, UPDATE = ("data.", "model.update.", "model.sampling."), ("model.update.",)
HELPLESS = {LOADING: UNBATCHED, OPTIMISER: UNBATCHED, WRITING: UPDATE, SCORING: UPDATE, ROLLOUT: UPDATE}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, on a device or for the process."""
    return isinstance(error, MemoryError) or bool(isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)))


def memory_advice(error: BaseException, stage: str, command: str, settings: Mapping[str, Any]) -> str:
    """A message that says where memory ran out, and which keys to turn.

    Args:
        error: What was raised.
        stage: Name of the stage.
        command: `fit`, `validate`, `test` or `predict`.
        settings: Values of the stage's options, by their dotted keys.
    """
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:LONGEST]
    phase = _phase(error)
    where = f" in {phase}" if phase else ""
    lines = [f"lit-vapo {stage} {command}: out of memory{where} ({said})", "What helps, the most first:"]
    for key, does in KEYS[stage].items():
        if key.startswith(HELPLESS.get(phase, ())):
            continue
        value = settings.get(key)
        now = f" (now {value})" if isinstance(value, (int, float, str)) else ""
        lines.append(f"  {key}{now}: {does}")
    return "\n".join(lines)


def _phase(error: BaseException) -> str:
    """What a run was doing, as far as the frames of an error tell; else nothing."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = (name for frame in reversed(frames) for module, function, name in PHASES if _fits(frame, module, function))
    return next(found, "")


def _fits(frame: FrameType, module: str, function: str) -> bool:
    place = str(frame.f_globals.get("__name__", ""))
    return (place + ".").startswith(module + "." if module else "") and frame.f_code.co_name.startswith(function)
