"""What generated inputs are derived from: a tiny model, tokenizer, ensembles, policies and checkpoints, made once."""

import functools
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from lit_vapo.cli import main
from tests import helpers

TEMPLATE = (
    "{% if tools %}<bos>tools:{{ tools | tojson }}<eos>{% endif %}"
    "{% for m in messages %}<bos>{{ m['role'] }}:{{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] or [] %}[{{ call | tojson }}]{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)


@functools.cache
def root() -> Path:
    """A folder of this process."""
    return Path(tempfile.mkdtemp(prefix="generated-"))


@functools.cache
def text_tokenizer() -> str:
    """Folder of a byte-level tokenizer whose template writes tools and tool calls, too."""
    made = helpers.tiny_tokenizer(root() / "tokenizer")
    made.chat_template = TEMPLATE
    made.save_pretrained(root() / "tokenizer")
    return str(root() / "tokenizer")


@functools.cache
def tokenizer():
    """This tokenizer."""
    return AutoTokenizer.from_pretrained(text_tokenizer())


@functools.cache
def model() -> str:
    """Folder of a tiny model with this tokenizer."""
    return helpers.tiny_model(root() / "model", tokenizer())


@functools.cache
def checkpoint(stage: str) -> str:
    """The last checkpoint of a tiny run."""
    folder, given = root() / stage, {"model.base.path": model(), "data.tokenizer": model()}
    given["data.preferences"] = helpers.tiny_preferences(root() / "preferences.jsonl")
    given["data.prompts"] = helpers.tiny_prompts(root() / "prompts.jsonl")
    if stage == "reward":
        given |= {"model.reference.path": model(), "model.reference_sampling.max_new_tokens": 6}
        given["model.num_reference"] = 12
    if stage == "ppo":
        given["model.reward"] = exported("reward")
    given |= {"config": helpers.CONFIGS / stage / "tiny.yaml", "trainer.default_root_dir": folder}
    main([stage, "fit", *(f"--{key}={value}" for key, value in given.items())])
    return str(helpers.last(folder))


@functools.cache
def exported(stage: str) -> str:
    """The ensemble or policy that was exported from it."""
    folder = root() / f"{stage}_exported"
    main(["export", f"--checkpoint={checkpoint(stage)}", f"--output={folder}"])
    return str(folder)
