"""`lit-vapo reward serve`: any source of rewards that a folder holds, as an HTTP service."""

from __future__ import annotations

import hmac
import json
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import torch

from lit_vapo.commands.sources import chosen_source, device_of, ready, row_responses, warn_of_units
from lit_vapo.console import meant
from lit_vapo.http_client import read_token
from lit_vapo.rewards import RewardSource
from lit_vapo.rewards.protocol import LARGEST_BODY, read_request
from lit_vapo.rollout import Encoders

# A client that says nothing for so many seconds is left.
PATIENCE = 60.0
CHUNK = 64 * 1024
UNKNOWN = "expected the bearer token of this service"


def serve(
    reward: RewardSource | str | None = None,
    ensemble: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_env: str | None = None,
    trust: list[str] | None = None,
) -> None:
    """Score responses for others over HTTP, until Ctrl-C or SIGTERM; `RemoteReward` is who asks.

    Args:
        reward: Folder of an ensemble or of public reward models, or a source of rewards.
        ensemble: Another name of `reward`, for a folder.
        host: Address to listen on; `0.0.0.0` lets other machines ask, and then take a `token_env`.
        port: Port to listen on; 0 takes a free one.
        token_env: Name of the environment variable with the bearer token that clients must send; `null` for none.
        trust: Code outside of lit_vapo that the folder may run: classes by their Python name, models that bring code by
            folder or hub name.

    Raises:
        ValueError: There is no such source, or the variable is not set.
    """
    token = read_token(token_env, "--token_env")
    if not 0 <= port < 2**16:
        raise ValueError(f"--port: expected 0 … {2**16 - 1}, got {port}")
    source = ready(chosen_source(reward, ensemble, trust), device_of())
    if source.num_members > 1 and not source.separate_members:
        raise ValueError(
            f"--reward: expected separate members to deliver, got {type(source).__name__} without; a sum has them with "
            "`aligned: true`"
        )
    if source.columns:
        raise ValueError(f"--reward: expected a source that reads texts alone, got one that reads {source.columns}")
    warn_of_units(source)
    with _Server((host, port), source, token) as server, _until_told(server):
        print(
            f"listening on http://{host}:{server.server_port} ({source.num_members} members); Ctrl-C ends it",
            flush=True,
        )
        server.serve_forever()


@contextmanager
def _until_told(server: ThreadingHTTPServer) -> Iterator[None]:
    """A block in which Ctrl-C and SIGTERM end the service, and nothing else."""

    def stop(number: int, frame: Any) -> None:
        # From another thread: this one is serving, and would wait for itself.
        threading.Thread(target=server.shutdown, daemon=True).start()

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


class _RefusedError(Exception):
    """A request that is not answered with rewards."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Server(ThreadingHTTPServer):
    """Holds the source; requests are read side by side and scored one after another."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], source: RewardSource, token: str | None) -> None:
        super().__init__(address, _Handler)
        self.source = source
        self.token = token
        self.encoders = Encoders()
        self.lock = threading.Lock()

    @torch.no_grad()
    def score(self, body: bytes) -> list[list[float]] | list[float]:
        """The rewards that a request asks for.

        Raises:
            ValueError: It is no request, or a response cannot be scored.
        """
        rows = read_request(body).rows
        with self.lock:
            found = self.source.estimate(row_responses(rows, self.encoders))
        if self.source.num_members == 1:
            return cast("list[float]", found.mean.tolist())
        if found.members is None:
            raise ValueError("expected a source with separate members")
        return cast("list[list[float]]", found.members.tolist())


class _Handler(BaseHTTPRequestHandler):
    """Answers with rewards, or with a sentence."""

    timeout = PATIENCE
    server: _Server

    def do_POST(self) -> None:
        """Score a batch."""
        try:
            rewards = self.server.score(self._body())
        except _RefusedError as error:
            self._answer(error.status, {"error": str(error)})
        except OSError:
            self.close_connection = True  # whoever asked has gone, or says nothing more
        except Exception as error:
            if isinstance(error, ValueError) and meant(error):
                self._answer(400, {"error": str(error)})
                return
            traceback.print_exc()
            self._answer(500, {"error": "scoring failed; the service's own output says why"})
        else:
            self._answer(200, {"rewards": rewards})

    def do_GET(self) -> None:
        """Say what this is."""
        source = self.server.source
        self._answer(200, {"num_members": source.num_members, "calibrated": source.calibrated})

    def _body(self) -> bytes:
        size = self.headers.get("Content-Length", "")
        if not (size.isascii() and size.isdigit()):
            raise _RefusedError(411, "expected a body with its Content-Length")
        if len(size) > 15 or int(size) > LARGEST_BODY:
            raise _RefusedError(
                413, f"expected a body of at most {LARGEST_BODY} bytes, got {size[:15]}; send fewer rows"
            )
        if not self._known():
            # Read, and not kept: a client that is still sending would not hear why.
            left = int(size)
            while left and (part := self.rfile.read(min(left, CHUNK))):
                left -= len(part)
            raise _RefusedError(401, UNKNOWN)
        return self.rfile.read(int(size))

    def _known(self) -> bool:
        """Whether whoever asks has the token, if there is one."""
        given, token = self.headers.get("Authorization", ""), self.server.token
        return token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode())

    def _answer(self, status: int, record: dict[str, Any]) -> None:
        body = json.dumps(record).encode()
        # Whoever asked may have gone; that is not this service's to tell.
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not told one by one; what fails is."""
