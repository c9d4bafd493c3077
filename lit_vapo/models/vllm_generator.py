"""The generator that asks a vLLM server, which runs in an environment and a process of its own."""

from __future__ import annotations

import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_vapo.http_client import NoAnswerError, check_url, read_token
from lit_vapo.models.generation import Generated, Generator, Sampling
from lit_vapo.models.policy import Policy, Role
from lit_vapo.models.processes import of_all, rank, together
from lit_vapo.models.transformers_generator import TransformersGenerator
from lit_vapo.models.vllm_checks import check_answers, check_served
from lit_vapo.models.vllm_client import Completion, VllmClient, request
from lit_vapo.models.vllm_server import VllmServer, lora_room
from lit_vapo.models.vllm_weights import ServedWeights
from lit_vapo.ranges import PositiveFloat, PositiveInt, check_ranges

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Requests under way at once; the server queues what it has no room for.
CONNECTIONS = 256
# Seconds that a server has to say that it is well, after it did not answer.
RECOVERY = 30.0


class VllmGenerator(Generator):
    """Samples with a vLLM server: one that runs already, or one that this starts in vLLM's own environment.

    The policy's weights go there before its responses are drawn: an adapter as a new folder under a name with its
    version, whole weights as a folder that the server reloads (slow; the reference is then sampled with transformers).
    The server reads these folders, so it runs on this machine or shares a file system with it. In a distributed run
    each process asks for its own prompts, and the first one looks after the weights.

    Args:
        address: A server that runs, `http://host:port`, if this is to start none.
        python: Python interpreter of an environment with vLLM, if this is to start a server.
        options: Further words of the command line of the server to start (`vllm serve --help`).
        environment: Further environment variables of the server to start.
        port: Where the server to start listens; `null` for a free port.
        folder: Where weights are handed over; `null` for `generator` in the run's folder.
        timeout_seconds: Longest wait for the responses to a batch of prompts, and for new weights to be in place.
        start_seconds: Longest wait for the server to come up.
        max_kl: Largest KL(sampler‖learner), nats per token, of a probe at the start and of each batch of responses;
            above, the run ends. `null` for any.
        token_env: Name of the environment variable that holds the server's API key; never the key itself.

    Raises:
        ValueError: Neither or both of `address` and `python` are given, or a number is out of its range.
    """

    def __init__(
        self,
        address: str | None = None,
        python: str | None = None,
        options: list[str] | None = None,
        environment: dict[str, str] | None = None,
        port: PositiveInt | None = None,
        folder: str | None = None,
        timeout_seconds: PositiveFloat = 600.0,
        start_seconds: PositiveFloat = 600.0,
        max_kl: PositiveFloat | None = 0.1,
        token_env: str | None = None,
    ) -> None:
        check_ranges(VllmGenerator, locals(), "model.generator.")
        if (address is None) == (python is None):
            raise ValueError(
                "model.generator: expected the address of a vLLM server, or python (the interpreter of an environment "
                f"with vLLM) to start one, got {'neither' if address is None else 'both'}"
            )
        if address is not None:
            check_url(address, "model.generator.address")
            if options or environment or port:
                raise ValueError(
                    "model.generator: expected options, environment and port for a server to start (python), got them "
                    "with the address of one that runs"
                )
        self.address = address
        self.python = python
        self.options = options
        self.environment = environment
        self.port = port
        self.folder = folder
        self.timeout_seconds = timeout_seconds
        self.start_seconds = start_seconds
        self.max_kl = max_kl
        self.token_env = token_env
        self._server: VllmServer | None = None
        self._client: VllmClient | None = None
        self._weights: ServedWeights | None = None
        self._transformers = TransformersGenerator()
        self._vocabulary = 0
        self._role: Role = "actor"

    def open(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        longest: int,
        folder: Path,
        version: int,
    ) -> None:
        """Find or start the server, give it the policy's weights, and see that it samples from them (see `Generator`).

        Raises:
            ValueError: The server does not come, or cannot answer for this policy; the message says why.
        """
        self.close()
        token = read_token(self.token_env, "model.generator.token_env")
        home = Path(self.folder or folder / "generator").absolute()
        run = of_all(secrets.token_hex(3))[0]
        address = self.address
        with self._together():
            if any(isinstance(p.data, DTensor) for p in policy.parameters()):
                raise ValueError(
                    "model.generator: expected weights that each process holds whole, got sharded ones; use "
                    "TransformersGenerator, or a strategy that does not shard (ddp)"
                )
            if rank() == 0 and self.folder is None:
                # What a run left here that was killed; no other uses this folder.
                for left in home.glob("v[0-9]*"):
                    shutil.rmtree(left)
            if rank() == 0 and self.python is not None:
                self._server = self._started(policy, longest, home / "server.log")
                address = self._server.address
        address, hosts = of_all(address)[0], set(of_all(socket.gethostname()))
        assert address is not None
        client = self._client = VllmClient(address, self.timeout_seconds, token)
        with self._together():
            if self.python is not None and len(hosts) > 1:
                raise ValueError(
                    f"model.generator: expected the address of a server for a run on {len(hosts)} machines, got python"
                )
            base = self._found(client, policy, tokenizer, longest) if rank() == 0 else ""
        self._weights = ServedWeights(client, of_all(base)[0], home, run, self.timeout_seconds)
        self._vocabulary = policy.causal_lm.get_input_embeddings().num_embeddings
        self.sync(policy, "actor", version)
        with self._together():
            if rank() == 0:
                asked = self._weights.model("actor")
                check_answers(self._draw, policy, tokenizer, asked, longest, self.max_kl)

    def sync(self, policy: Policy, role: Role, version: int) -> None:
        """Give the server the policy's weights, unless it has them (see `Generator`).

        Raises:
            ValueError: The server does not take them, or says that it has others.
        """
        self._role = role
        if self._weights is not None and role == "actor":
            with self._together():
                self._weights.bring(policy, version, first=rank() == 0)

    def close(self) -> None:
        """End the server if this started it, and remove what was handed over."""
        if self._weights is not None and rank() == 0:
            self._weights.close()
        if self._server is not None:
            self._server.close()
        self._server = self._client = self._weights = None

    @torch.no_grad()
    def __call__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        sampling: Sampling,
        stops: list[int],
    ) -> Generated:
        """Respond to each prompt (see `Generator`).

        Raises:
            ValueError: `open` was not called, the server does not answer in time (a request is tried a second time,
                once the server says that it is well), or its answer is not one to these prompts.
        """
        weights = self._weights
        if weights is None:
            raise ValueError("model.generator: expected open() before the first prompt")
        if self._role == "reference" and not weights.serves_reference:
            return self._transformers(lm, tokenizer, prompt_ids, prompt_lengths, sampling, stops)
        model = weights.model(self._role)
        # A number for each prompt: equal ones would be answered alike. The server counts up from it for the n of one.
        seeds = torch.randint(2**62, (len(prompt_ids),)).tolist()
        size = prompt_ids.shape[1]
        prompts = [ids[size - n :] for ids, n in zip(prompt_ids.tolist(), prompt_lengths.tolist(), strict=True)]
        with self._together():
            bodies = [request(p, sampling, stops, model, seed) for p, seed in zip(prompts, seeds, strict=True)]
            drawn = self._draw(bodies)
            version = weights.version_of({row.model for row in drawn}, self._role)
        longest = max(len(row.ids) for row in drawn)
        lengths = torch.tensor([len(row.ids) for row in drawn])
        ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in drawn])
        logprobs = torch.tensor([row.logprobs + [0.0] * (longest - len(row.ids)) for row in drawn])
        stopped = torch.tensor([row.stopped for row in drawn])
        to = prompt_ids.device
        return Generated(ids.to(to), lengths.to(to), stopped.to(to), logprobs.to(to), version)

    def _draw(self, bodies: list[dict[str, Any]]) -> list[Completion]:
        """The responses to some requests, in their order."""
        end = time.monotonic() + self.timeout_seconds
        with ThreadPoolExecutor(min(len(bodies), CONNECTIONS)) as pool:
            rows = [row for found in pool.map(lambda body: self._ask(body, end), bodies) for row in found]
        for row in rows:
            if max(row.ids) >= self._vocabulary:
                raise ValueError(
                    f"model.generator: expected tokens of the model's {self._vocabulary}, got {max(row.ids)}: the "
                    "server has another vocabulary"
                )
        return rows

    def _ask(self, body: dict[str, Any], end: float) -> list[Completion]:
        assert self._client is not None
        for attempt in (1, 2):
            try:
                found = self._client.complete(body)
            except NoAnswerError as error:
                if attempt == 2 or time.monotonic() > end or not self._client.recovers(RECOVERY):
                    raise ValueError(f"model.generator: expected responses, got none: {self._why(error)}") from None
                continue
            short = [len(row.ids) for row in found if not row.stopped and len(row.ids) < body["max_tokens"]]
            if short:
                raise ValueError(
                    f"model.generator: expected responses of up to {body['max_tokens']} tokens, got one cut off after "
                    f"{short[0]}: the server's context is too short (--max-model-len)"
                )
            return found
        raise AssertionError

    def _why(self, error: Exception) -> str:
        """What is known of a server that does not answer."""
        told = f" The server's log {self._server.told()}" if self._server is not None else ""
        return f"{error}.{told} The run goes on with --resume, once there is a server."

    def _started(self, policy: Policy, longest: int, log: Path) -> VllmServer:
        assert self.python is not None
        base = policy.start
        words = [base.path, "--max-model-len", str(longest), "--logprobs-mode", "processed_logprobs"]
        # Left to itself, vLLM would take float16 for a model that is stored in float32.
        words += ["--dtype", str(policy.causal_lm.dtype).removeprefix("torch.")]
        words += [] if base.revision is None else ["--revision", base.revision]
        variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if policy.lora_rank is not None:
            words += ["--enable-lora", "--max-lora-rank", str(lora_room(policy.lora_rank))]
            variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        else:
            variables["VLLM_SERVER_DEV_MODE"] = "1"
        given = {**variables, **(self.environment or {})}
        return VllmServer(self.python, [*words, *(self.options or [])], given, self.port, log)

    def _found(self, client: VllmClient, policy: Policy, tokenizer: PreTrainedTokenizerBase, longest: int) -> str:
        """The name of the base that the server offers, once it answers and fits."""
        if self._server is not None:
            self._server.wait(client.ready, self.start_seconds)
        elif not client.recovers(self.start_seconds):
            raise ValueError(
                f"model.generator.address: expected a vLLM server at {client.address} within start_seconds = "
                f"{self.start_seconds:g}, got no answer"
            )
        return check_served(client, policy, tokenizer, longest)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A block that fails in all processes if in one, and leaves nothing running then."""
        try:
            with together():
                try:
                    yield
                except NoAnswerError as error:
                    raise ValueError(f"model.generator: expected an answer, got none: {self._why(error)}") from None
        except BaseException:
            self.close()
            raise
