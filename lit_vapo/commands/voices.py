"""Who answers: an exported policy, the last checkpoint of a run, or any language model; and how answers are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lit_vapo.commands.export import write_export
from lit_vapo.commands.resume import checkpoint_meant
from lit_vapo.commands.run_folder import CHECKPOINTS
from lit_vapo.commands.sources import device_of
from lit_vapo.console import visible
from lit_vapo.models.exported import ADAPTER_CONFIG, AdapterFile, check_policy, is_adapter
from lit_vapo.models.policy import Policy
from lit_vapo.models.pretrained import Pretrained, load_causal_lm, load_tokenizer, place
from lit_vapo.models.settings import read_settings
from lit_vapo.models.weights import check_model

POLICY, REFERENCE = "policy", "reference"

# What answers, for the length of a block.
Voice = Callable[[], AbstractContextManager[Any]]


@contextmanager
def exported(policy: str, trust: list[str] | None = None) -> Iterator[str]:
    """A block with the folder of a policy, or its hub name.

    Of a run it is what `lit-vapo export` makes of the last checkpoint; nothing of that outlives the block.

    Args:
        policy: Folder of an exported policy or of a run, or any language model of transformers.
        trust: Code that a run's checkpoint may run.

    Raises:
        ValueError: The run has no checkpoint yet, or one of an ensemble.
    """
    checkpoints = Path(policy) / CHECKPOINTS
    if not checkpoints.is_dir():
        yield policy
        return
    with TemporaryDirectory() as folder:
        path, output = checkpoint_meant("last", checkpoints).path, str(Path(folder) / Path(policy).name)
        stage = write_export(str(path), output, trust=trust)
        if stage == "reward":
            raise ValueError(f"{policy}: expected a policy, or a run of the ppo or the sft stage, got one of {stage!r}")
        yield output


def check_voice(policy: str) -> None:
    """Refuse what is no policy before anything is loaded, as far as files tell.

    Raises:
        ValueError: There is no such policy.
    """
    if not is_adapter(policy) and not (Path(policy) / CHECKPOINTS).is_dir():
        check_model(policy, "policy")


def find_voices(policy: str, base: str | None, quantization: Any, reference: bool) -> tuple[Any, dict[str, Voice]]:
    """The models that answer, and their tokenizer.

    Args:
        policy: Folder or hub name, as `exported` gives it.
        base: What a whole model is compared with.
        quantization: As in `Pretrained`.
        reference: Whether the reference answers, too.

    Raises:
        ValueError: There is no such model, or nobody knows the reference.
    """
    if is_adapter(policy):
        base = base or read_settings(Path(policy) / ADAPTER_CONFIG, AdapterFile).base_model_name_or_path
        if base is None:
            raise ValueError(f"--base: expected the base of the adapter in {policy!r}, which names none, got none")
        spec = Pretrained(base, quantization=quantization)
        both = Policy(spec, check_policy(policy, spec, None), keep_reference=False, start=policy).to(device_of())
        voices: dict[str, Voice] = {POLICY: partial(both.acting_as, "actor")}
        if reference:
            voices[REFERENCE] = partial(both.acting_as, "reference")
        return load_tokenizer(spec), voices
    if reference and base is None:
        raise ValueError(f"--base: expected the reference of {policy!r}, which is a whole model, got none")
    spec = Pretrained(policy, quantization=quantization)
    voices = {POLICY: _alone(spec)}
    if reference:
        voices[REFERENCE] = _alone(Pretrained(str(base), quantization=quantization))
    return load_tokenizer(spec), voices


def _alone(spec: Pretrained) -> Voice:
    lm = place(load_causal_lm(spec), device_of())
    return lambda: nullcontext(lm)


def opinion(reward: float | None, sigma: float | None) -> str:
    """What is shown of an ensemble's estimate of an answer; `None` where it says nothing."""
    if reward is None:
        return "[no opinion]"
    return f"[{reward:+.2f}]" if sigma is None else f"[{reward:+.2f} ± {sigma:.2f}]"


def plain(text: str) -> str:
    """A text as it is printed: its line breaks and tabs break and tab, other control characters are shown."""
    return visible(text, "\n\t")
