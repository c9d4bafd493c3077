"""`lit-vapo chat`: talk to a policy, and see what an ensemble thinks of its answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lit_vapo.commands.options import Parser
from lit_vapo.commands.sources import chosen_source, device_of, opinions, ready
from lit_vapo.commands.voices import Voice, exported, find_voices, opinion, plain
from lit_vapo.data.encoder import Encoder
from lit_vapo.models.answers import Answer, answers
from lit_vapo.models.generation import Sampling
from lit_vapo.models.weights import quiet
from lit_vapo.rewards import RewardSource
from lit_vapo.rollout import Encoders, text_responses
from lit_vapo.types import Prompt

ANEW = "/new"


def chat(
    policy: str,
    ensemble: str | None = None,
    reference: bool = False,
    sampling: Sampling | None = None,
    base: str | None = None,
    quantization: str | None = None,
    seed: int | None = None,
    trust: list[str] | None = None,
) -> None:
    """Talk to a policy: each line that you type is answered.

    Where the policy has a chat template the lines are a conversation, which goes on with the first answer; `/new`
    begins another. Otherwise each line is a text to continue. Ctrl-D ends it.

    Args:
        policy: Folder of an exported policy or of a run (its last checkpoint), or any language model of transformers.
        ensemble: Folder of an ensemble or of public reward models: each answer is shown with its mean ± σ.
        reference: Let the reference answer, too.
        sampling: How answers are drawn; `num_responses` of them to each line.
        base: The reference of a policy that is a whole model; an adapter names its own.
        quantization: `8bit` or `4bit` for the base of an adapter, or for a whole model.
        seed: Seed of the answers; `null` for other answers every time.
        trust: Code outside of lit_vapo that the folders may run: classes by their Python name, models that bring code
            by folder or hub name.

    Raises:
        ValueError: There is no such policy, reference or ensemble.
    """
    sampling = sampling or Sampling(256)
    if seed is not None:
        torch.manual_seed(seed)
    with exported(policy, trust) as folder:
        tokenizer, voices = find_voices(folder, base, quantization, reference)
    source = None if ensemble is None else ready(chosen_source(None, ensemble, trust), device_of())
    talk = Talk(tokenizer, voices, sampling, source)
    asks = sys.stdin.isatty()
    if asks:
        print(f"{policy}: type a line; {ANEW} begins anew, Ctrl-D ends")
    for line in _lines("> " if asks else ""):
        if line == ANEW:
            talk.begin()
        elif line.strip():
            talk.answer(line)


class Talk:
    """A conversation, or single lines where there is no chat template.

    Args:
        tokenizer: Of all voices.
        voices: Who answers; the first goes on with the conversation.
        sampling: How answers are drawn.
        source: What thinks of them, if anything.
    """

    def __init__(
        self,
        tokenizer: Any,
        voices: dict[str, Voice],
        sampling: Sampling,
        source: RewardSource | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.voices = voices
        self.sampling = sampling
        self.source = source
        self.encoder = Encoder(tokenizer)
        self.encoders = Encoders()
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, Any]] = []

    def answer(self, line: str) -> None:
        """Print what each voice says to a line."""
        talks = self.tokenizer.chat_template is not None
        self.messages.append({"role": "user", "content": line})
        prompt = Prompt(list(self.messages) if talks else line)
        first: str | None = None
        for name, voice in self.voices.items():
            with voice() as lm:
                drawn = self._draw(lm, prompt, name)
            self._judge(prompt, drawn, name)
            first = drawn[0].text if first is None else first
        self.messages.append({"role": "assistant", "content": first})

    def _draw(self, lm: Any, prompt: Prompt, name: str) -> list[Answer]:
        """The answers of a voice; one alone is printed as it comes."""
        ids = self.encoder.prompt(prompt, "prompt").ids
        if self.sampling.num_responses > 1:
            return answers(lm, self.tokenizer, ids, self.sampling)
        print(_title(name, len(self.voices)), end="", flush=True)
        return answers(lm, self.tokenizer, ids, self.sampling, lambda piece: print(plain(piece), end="", flush=True))

    @torch.no_grad()
    def _judge(self, prompt: Prompt, drawn: list[Answer], name: str) -> None:
        """Print the answers that are not there yet, and what the ensemble thinks."""
        texts, ended = [answer.text for answer in drawn], [answer.ended for answer in drawn]
        said = [""] * len(texts)
        if self.source is not None:
            asked = text_responses([prompt] * len(texts), texts, ended, self.encoders, device_of())
            said = [opinion(found["reward"], found["sigma"]) for found in opinions(self.source, asked)]
        if len(texts) == 1:
            if said[0]:
                print(said[0])
            return
        print(_title(name, len(self.voices)), end="")
        for number, (text, what) in enumerate(zip(texts, said, strict=True), 1):
            print(f"{number}. {what}{' ' * bool(what)}{plain(text)}")


def _title(name: str, voices: int) -> str:
    return f"{name}:\n" if voices > 1 else ""


def _lines(prompt: str) -> Iterator[str]:
    """What is typed, line by line."""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


def main(words: Sequence[str]) -> None:
    """Parse a command line without `lit-vapo chat`, and run."""
    quiet()
    parser = Parser(prog="lit-vapo chat", description=(chat.__doc__ or "").partition("\n\n")[0])
    parser.add_argument("policy", type=str, help="Folder of an exported policy or of a run, or any language model.")
    parser.add_function_arguments(chat, skip={"policy"}, as_group=False)
    parsed = parser.parse_args(list(words))
    chat(**parser.instantiate_classes(parsed).as_dict())
