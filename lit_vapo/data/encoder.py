"""From what a row says to token ids: the tokens of prompt and response are those of the whole, cut where it begins."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from lit_vapo.data.bounded import bounded
from lit_vapo.data.conversation import Preference
from lit_vapo.data.literals import Control, LiteralEncoder
from lit_vapo.data.offsets import Tokens, added_at_end, tokens_of
from lit_vapo.data.templates import ChatTemplate, Tools, joined, shared
from lit_vapo.stops import end_of_response, stop_tokens
from lit_vapo.types import Messages, Prompt, TokenSequence

# Real templates take milliseconds.
SECONDS = 10.0


class EncodedPrompt(NamedTuple):
    """A prompt to respond to.

    Attributes:
        ids: Token ids.
        text: What they say, control tokens included.
    """

    ids: list[int]
    text: str


class EncodedPair(NamedTuple):
    """Two responses to one prompt.

    Attributes:
        prompt_ids: Token ids of the prompt, the same before both responses.
        chosen_ids: Those of the preferred response, with the token that ends it.
        rejected_ids: Those of the other.
        prompt: Text of the prompt, control tokens included.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt: str


class _Asked(NamedTuple):
    """A prompt as it is written, on its way to tokens.

    Attributes:
        text: The prompt; mentions of control tokens are hidden if `hidden`.
        content: The text or the messages it was made of, as hidden.
        tools: Those of the messages.
        hidden: Whether mentions of control tokens are hidden (see `LiteralEncoder`).
        place: Where it is from.
    """

    text: str
    content: str | Messages
    tools: Tools
    hidden: bool
    place: str


class Encoder:
    """Reads prompts and responses with a tokenizer, the same way in every stage.

    Prompt and response are one text, or one conversation in the chat template, and are encoded as a whole. The prompt
    is what a conversation with an answer and one that waits for it both begin with. A token that reaches over the
    boundary belongs to the response. A response ends with the first token that stops the model; what a template
    writes after that is left out. A response without one gets the end of sequence.

    Strings of control tokens in texts and messages are ordinary text, unless texts are `templated`.

    Args:
        tokenizer: The tokenizer.
        stops: Tokens that stop the model, besides the tokenizer's end of sequence.
        template_kwargs: Arguments of the chat template (see `ChatTemplate`).
        templated: Texts are in a chat template's form already, and control tokens in them act. Messages are refused.
        append_eos: Whether a response without a stop token gets the end of sequence.

    Raises:
        ValueError: As in `ChatTemplate`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int] = (),
        *,
        template_kwargs: dict[str, Any] | None = None,
        templated: bool = False,
        append_eos: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.stops = stop_tokens(stops, tokenizer.eos_token_id)
        self.templated = templated
        self.append_eos = append_eos
        self.template = ChatTemplate(tokenizer, template_kwargs)
        self.control = Control.of(tokenizer, self.stops)
        end = tokenizer.eos_token_id
        self._end = [int(end)] if end is not None else list(self.stops[:1])
        self._literal: LiteralEncoder | None = None
        self._warned = False

    def prompt(self, prompt: Prompt, place: str) -> EncodedPrompt:
        """A prompt to respond to.

        Args:
            prompt: The prompt.
            place: Where it is from, for messages.

        Raises:
            ValueError: The chat template refuses it or its tools, or messages meet an encoder of templated texts.
        """
        with bounded(SECONDS, _too_long(place)):
            asked = self._ask(prompt, self._mentions(prompt), place)
        return EncodedPrompt(self._tokens(asked.text, asked).ids, self._shown(asked))

    def pair(self, preference: Preference, place: str) -> EncodedPair:
        """Both sides of a preference.

        Args:
            preference: The preference.
            place: Where it is from, for messages.

        Raises:
            ValueError: As in `prompt`, or a response does not continue the prompt in the chat template.
        """
        answers = (preference.chosen, preference.rejected)
        hidden = self._mentions(preference.prompt, *answers)
        with bounded(SECONDS, _too_long(place)):
            asked = self._ask(preference.prompt, hidden, place)
            wholes = [self._answered(asked, answer) for answer in answers]
        (chosen, first), (rejected, second) = (self._sides(asked, *whole, ended=True) for whole in wholes)
        # Both responses answer one prompt: what is not the same in both is not part of it.
        size = shared(chosen[:first], rejected[:second])
        return EncodedPair(chosen[:size], chosen[size:], rejected[size:], self._shown(asked))

    def response(self, prompt: Prompt, response: str, ended: bool, place: str = "reward") -> TokenSequence:
        """A response that a policy wrote, as this tokenizer and its chat template have it.

        Args:
            prompt: What was answered.
            response: The text of the response.
            ended: Whether it ended by itself; nothing follows its text otherwise.
            place: Where it is from, for messages.

        Raises:
            ValueError: As in `pair`.
        """
        text = isinstance(prompt.content, str)
        answer: str | Messages = response if text else [{"role": "assistant", "content": response}]
        with bounded(SECONDS, _too_long(place)):
            asked = self._ask(prompt, self._mentions(prompt, response), place)
            if ended or text:
                whole, last = self._answered(asked, answer)
            else:
                messages = joined(asked.content, self._hide(answer, asked), place)  # type: ignore[arg-type]
                whole, last = self.template.unfinished(messages, asked.tools, place), len(asked.text)
        return TokenSequence(*self._sides(asked, whole, last, ended))

    def closed(self, prompt: Prompt, response: str, place: str = "reward") -> TokenSequence:
        """Prompt and response as a whole that is over: where models from elsewhere were trained to judge it.

        A conversation goes up to all that its template writes after an answer, a stop token or not. A text ends as the
        tokenizer ends every text, or else with the end of sequence.

        Args:
            prompt: What was answered.
            response: The text of the response.
            place: Where it is from, for messages.

        Raises:
            ValueError: As in `pair`.
        """
        text = isinstance(prompt.content, str)
        answer: str | Messages = response if text else [{"role": "assistant", "content": response}]
        with bounded(SECONDS, _too_long(place)):
            asked = self._ask(prompt, self._mentions(prompt, response), place)
            whole, _ = self._answered(asked, answer)
        tokens = self._tokens(whole, asked)
        size = self._before(len(asked.text), whole, tokens, asked)
        return TokenSequence(tokens.ids + (added_at_end(self.tokenizer) or self._end) * text, size)

    # Texts.

    def _ask(self, prompt: Prompt, hidden: bool, place: str) -> _Asked:
        asked = _Asked("", prompt.content, prompt.tools, hidden, place)
        content, tools = self._hide(prompt.content, asked), self._hide(prompt.tools, asked)
        if isinstance(content, str):
            if tools:
                raise ValueError(f"{place}: expected messages beside tools, got a text")
            if hidden:
                self._warn_of_mentions(place)
            return asked._replace(text=content, content=content)
        if self.templated:
            raise ValueError(f"{place}: expected texts, for data.templated is true, got messages")
        return asked._replace(text=self.template.opening(content, tools, place), content=content, tools=tools)

    def _answered(self, asked: _Asked, answer: str | Messages) -> tuple[str, int]:
        """Prompt and answer, written as a whole, and where the answer's last message begins."""
        answer, start = self._hide(answer, asked), len(asked.text)
        if isinstance(asked.content, str):
            if not isinstance(answer, str):
                raise ValueError(f"{asked.place}: expected a text in answer to a text, got messages")
            return asked.text + answer, start
        if isinstance(answer, str) or not answer or answer[-1].get("role") != "assistant":
            raise ValueError(f"{asked.place}: expected an answer that ends with a message of the assistant")
        messages = joined(asked.content, answer, asked.place)
        text = self.template.finished(messages, asked.tools, asked.text, asked.place)
        if len(answer) > 1:
            before = self.template.render(messages[:-1], asked.tools, asked.place, respond=True)
            start = max(start, shared(before, text))
        return text, start

    # Control tokens that users mention.

    def _mentions(self, prompt: Prompt, *answers: str | Messages) -> bool:
        return not self.templated and any(map(self.control.inside, (prompt.content, prompt.tools, *answers)))

    def _hide(self, value: Any, asked: _Asked) -> Any:
        return self._literally(asked, lambda literal: literal.hide(value)) if asked.hidden else value

    def _shown(self, asked: _Asked) -> str:
        return str(self._literally(asked, lambda literal: literal.show(asked.text))) if asked.hidden else asked.text

    def _literally(self, asked: _Asked, use: Callable[[LiteralEncoder], Any]) -> Any:
        try:
            self._literal = self._literal or LiteralEncoder(self.tokenizer, self.control)
            return use(self._literal)
        except ValueError as error:
            raise ValueError(f"{asked.place}: {error}") from error

    def _warn_of_mentions(self, place: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{place}: a text mentions control tokens of {self.tokenizer.name_or_path!r}. Here and elsewhere they "
                "are read as ordinary text; if texts are in a chat template's form already, set data.templated.",
                stacklevel=2,
            )

    # Tokens.

    def _sides(self, asked: _Asked, whole: str, last: int, ended: bool) -> tuple[list[int], int]:
        """Token ids of prompt and response, and how many are the prompt.

        Args:
            asked: The prompt.
            whole: The text of both.
            last: Where the last message of the response begins.
            ended: Whether the response is to end.
        """
        tokens = self._tokens(whole, asked)
        size = self._before(len(asked.text), whole, tokens, asked)
        if not ended:
            return tokens.ids, size
        end = end_of_response(tokens.ids, self.stops, self._before(last, whole, tokens, asked))
        if end is not None:
            return tokens.ids[:end], size
        bare = asked.text + whole[len(asked.text) :].rstrip()
        if bare != whole and not isinstance(asked.content, str):
            # A template whose turns end with white space alone.
            return self._sides(asked, bare, min(last, len(bare)), ended)
        return tokens.ids + self._end * self.append_eos, size

    def _before(self, where: int, text: str, tokens: Tokens, asked: _Asked) -> int:
        """How many tokens are those of the text before a character; one that reaches over it is not."""
        spans = tokens.spans
        size = None if spans is None else next((i for i, (_, end) in enumerate(spans) if end > where), len(spans))
        if spans is not None and size is not None and (size == len(spans) or spans[size][0] >= where):
            return size
        # A token reaches over, or the tokenizer does not tell. It may only have swallowed white space after it.
        alone = self._tokens(text[:where], asked).ids
        common = shared(tokens.ids, alone)
        return common if size is None or common == len(alone) else size

    def _tokens(self, text: str, asked: _Asked) -> Tokens:
        plain = isinstance(asked.content, str)
        if asked.hidden:
            return cast("Tokens", self._literally(asked, lambda literal: literal.encode(text, plain)))
        tokens = tokens_of(self.tokenizer, text, plain)
        if self.templated and 0 < tokens.added < len(tokens.ids) and tokens.ids[0] == tokens.ids[tokens.added]:
            # The text brings the beginning of sequence that the tokenizer adds.
            tokens = Tokens(tokens.ids[tokens.added :], tokens.spans and tokens.spans[tokens.added :], 0)
        return tokens


def _too_long(place: str) -> str:
    return f"{place}: expected a chat template that ends within {SECONDS:g} seconds, got one that does not"
