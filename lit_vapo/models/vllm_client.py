"""What is asked of a vLLM server, by HTTP: nothing of vLLM is imported."""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lit_vapo.http_client import NoAnswerError, ask
from lit_vapo.models.generation import Sampling

# Most bytes of an answer: a token takes less than 200, so a million of them are no mistake.
LARGEST = 2**28
# Seconds that any request but for responses may take.
SHORT = 120.0
# Seconds between two looks at a server that is not there yet.
PAUSE = 0.5

M = TypeVar("M", bound=BaseModel)


class Served(BaseModel):
    """A model that a server offers; an adapter has a parent."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[Served]


class _Tokens(BaseModel):
    tokens: list[int]


class _Said(BaseModel):
    token_logprobs: list[float | None]


class _Choice(BaseModel):
    index: int
    finish_reason: str | None
    logprobs: _Said | None = None
    token_ids: list[int] | None = None


class _Completion(BaseModel):
    model: str
    choices: list[_Choice]


class _Weights(BaseModel):
    weight_version: str


class Completion(NamedTuple):
    """One response.

    Attributes:
        ids: Its tokens, the one that ended it included.
        logprobs: Their log-probabilities, nats.
        stopped: Whether it ended by itself.
        model: What the server says it sampled with.
    """

    ids: list[int]
    logprobs: list[float]
    stopped: bool
    model: str


class VllmClient:
    """Talks to one server.

    Args:
        address: `http://host:port`.
        timeout: Longest wait for responses, in seconds.
        token: A bearer token, if it asks for one.
    """

    def __init__(self, address: str, timeout: float, token: str | None = None) -> None:
        self.address = address.rstrip("/")
        self.timeout = timeout
        self.token = token

    def ready(self) -> bool:
        """Whether it says that it is well."""
        try:
            self._ask("/health", timeout=min(5.0, self.timeout))
        except ValueError:
            return False
        return True

    def recovers(self, seconds: float) -> bool:
        """Whether it says so within some seconds."""
        end = time.monotonic() + seconds
        while not self.ready():
            if time.monotonic() > end:
                return False
            time.sleep(PAUSE)
        return True

    def models(self) -> list[Served]:
        """What it offers, base models first."""
        return sorted(self._read("/v1/models", _Models).data, key=lambda model: model.parent is not None)

    def tokenize(self, model: str, text: str) -> list[int]:
        """Tokens of a text, without special ones around it."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return self._read("/tokenize", _Tokens, body).tokens

    def load_adapter(self, name: str, path: str) -> None:
        """Offer an adapter under a new name.

        Args:
            name: Its name.
            path: Its folder, which the server reads.
        """
        self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload_adapter(self, name: str) -> None:
        """Offer an adapter no longer."""
        self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def load_weights(self, path: str, version: str) -> None:
        """Take the weights of a folder in place of the base's, under a version.

        Args:
            path: A folder of safetensors, which the server reads.
            version: What it is to call them.
        """
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}, self.timeout)
        # Else it would go on from what prompts meant to the weights before.
        self._ask("/reset_prefix_cache", {})
        self._ask("/update_weight_version", {"new_version": version})

    def weights(self) -> str:
        """The version of the base's weights, as it was told last."""
        return self._read("/weight_info", _Weights).weight_version

    def complete(self, body: dict[str, Any]) -> list[Completion]:
        """Responses to one prompt.

        Raises:
            NoAnswerError: There is no answer.
            ValueError: There is another one than responses with tokens and log-probabilities.
        """
        found = self._read("/v1/completions", _Completion, body, self.timeout)
        done = []
        for choice in sorted(found.choices, key=lambda x: x.index):
            ids, said = choice.token_ids, choice.logprobs.token_logprobs if choice.logprobs else None
            if choice.finish_reason not in ("stop", "length"):
                raise NoAnswerError(f"{self.address}: expected whole responses, got one with {choice.finish_reason!r}")
            if not ids or said is None or len(said) != len(ids) or None in said:
                raise ValueError(
                    f"{self.address}: expected a token id and a log-probability for each token (return_token_ids, "
                    f"logprobs), got {len(ids or [])} and {len(said or [])}"
                )
            done.append(
                Completion(ids, [x for x in said if x is not None], choice.finish_reason == "stop", found.model)
            )
        if len(done) != body["n"]:
            raise ValueError(f"{self.address}: expected {body['n']} responses to a prompt, got {len(done)}")
        return done

    def _read(self, path: str, kind: type[M], body: Any = None, timeout: float = SHORT) -> M:
        answer = self._ask(path, body, timeout)
        try:
            return kind.model_validate_json(answer)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{self.address}{path}: expected an answer of vLLM's, got {where}: {first['msg']}"
            ) from None

    def _ask(self, path: str, body: Any = None, timeout: float = SHORT) -> bytes:
        raw = None if body is None else json.dumps(body).encode("ascii")
        return ask(self.address + path, raw, self.token, timeout, LARGEST)


def request(prompt: list[int], sampling: Sampling, stops: list[int], model: str, seed: int) -> dict[str, Any]:
    """One prompt, as vLLM is asked.

    All that could shape the distribution is said, since the server fills what is left open from the model's settings.

    Args:
        prompt: Its tokens.
        sampling: How responses are drawn.
        stops: Tokens that end a response.
        model: Name of the base or the adapter.
        seed: Response j is drawn with `seed` + j.
    """
    return {
        "model": model,
        "prompt": prompt,
        "n": sampling.num_responses,
        "seed": seed,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_k": -1,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # The model's own ends are among the stop tokens.
        "ignore_eos": True,
        "stop_token_ids": stops,
        "stop": sampling.stop_strings or [],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
    }
