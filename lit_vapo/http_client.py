"""Requests of JSON, tried again where that may help, with an end to waiting and to reading."""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

# No pause is longer, in seconds.
LONGEST_PAUSE = 30.0
CHUNK = 2**16
# Names of parameters in a URL, which is saved with a run and told in messages.
SECRET = re.compile("key|token|secret|passw|auth|sig$|signature", re.IGNORECASE)


class NoAnswerError(ValueError):
    """A service did not answer this time, and may the next."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Go nowhere else: the texts and the token are for the service that was named."""

    def redirect_request(self, *args: Any) -> None:
        """Leave the answer as it is."""
        return


_OPENER = urllib.request.build_opener(_NoRedirects)
# No proxy knows the way to this machine.
_LOCAL = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
LOCAL = ("127.0.0.1", "localhost", "::1")


def read_token(variable: str | None, key: str) -> str | None:
    """A bearer token from an environment variable; None where no variable is named.

    Args:
        variable: Name of the variable.
        key: The option that names it, for the message.

    Raises:
        ValueError: It holds no token, or what cannot stand in a header.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    # What has no such characters can neither end a header nor begin another.
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(
            f"{key}: expected the name of an environment variable with a token, got {variable!r}, which holds "
            + ("something else" if token else "none")
        )
    return token


def check_url(url: str, key: str) -> None:
    """Refuse what is no address of a service.

    Raises:
        ValueError: It is not of the form `http(s)://host…`, or carries a password or a token.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        raise ValueError(f"{key}: expected http(s)://host[:port]/…, got {url!r}") from None
    secret = any(SECRET.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True))
    if parts.username or parts.password or secret:
        raise ValueError(f"{key}: expected no password in it, got one; name a variable with a token (token_env)")
    if not valid:
        raise ValueError(f"{key}: expected http(s)://host[:port]/…, got {url!r}")


def post(
    url: str,
    body: bytes,
    token: str | None,
    timeout: float,
    retries: int,
    pause: float,
    largest: int,
    sleep: Callable[[float], None] = time.sleep,
) -> bytes:
    """What a service answers.

    Tried again, after pauses of `pause`, 2·`pause`, 4·`pause` … seconds, where nobody answered, too late, or with 5xx.

    Args:
        url: The service.
        body: JSON.
        token: A bearer token, if it asks for one.
        timeout: Longest wait for an answer, and again for the whole of it, in seconds.
        retries: How often to try again.
        pause: First pause, in seconds.
        largest: Most bytes of an answer.
        sleep: Waits; a test may have no time.

    Raises:
        NoAnswerError: There is no answer.
        ValueError: There is one that says no. Messages name the URL and never the token.
    """
    for attempt in range(retries + 1):
        try:
            return ask(url, body, token, timeout, largest)
        except NoAnswerError as error:
            if attempt == retries:
                raise NoAnswerError(f"{error}, {retries + 1} times in all") from None
            sleep(min(pause * 2**attempt, LONGEST_PAUSE))
    raise AssertionError


def ask(url: str, body: bytes | None, token: str | None, timeout: float, largest: int) -> bytes:
    """What a service answers to one request: a POST, or a GET where there is no body.

    Args:
        url: The service.
        body: JSON.
        token: A bearer token, if it asks for one.
        timeout: Longest wait for an answer, and again for the whole of it, in seconds.
        largest: Most bytes of an answer.

    Raises:
        NoAnswerError: There is no answer.
        ValueError: There is one that says no. Messages name the URL and never the token.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, body, headers, method="GET" if body is None else "POST")
    try:
        return _read(request, timeout, largest)
    except NoAnswerError as error:
        raise NoAnswerError(f"{url}: {_hidden(str(error), token)}") from None
    except ValueError as error:
        raise ValueError(f"{url}: {_hidden(str(error), token)}") from None


def _read(request: urllib.request.Request, timeout: float, largest: int) -> bytes:
    late = f"expected an answer within {timeout:g} seconds, got none"
    try:
        opener = _LOCAL if urlsplit(request.full_url).hostname in LOCAL else _OPENER
        with opener.open(request, timeout=timeout) as answer:
            end = time.monotonic() + timeout
            parts, size = [], 0
            # A little now and then would be no time-out to the socket.
            while part := answer.read1(CHUNK):
                parts.append(part)
                size += len(part)
                if size > largest:
                    raise ValueError(f"expected an answer of at most {largest} bytes, got more")
                if time.monotonic() > end:
                    raise NoAnswerError(late)
            return b"".join(parts)
    except urllib.error.HTTPError as error:
        with error:
            told = f"expected status 200, got {error.code} {error.reason}{_said(error)}"
        raise (NoAnswerError if error.code >= 500 else ValueError)(told) from None
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            raise NoAnswerError(late) from None
        raise NoAnswerError(f"expected an answer, got none ({reason or type(reason).__name__})") from None


def _said(error: urllib.error.HTTPError) -> str:
    """What a service says of its refusal, or how that begins."""
    try:
        text = " ".join(error.read(2000).decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException):
        return ""
    return f": {text[:300]}" if text else ""


def _hidden(text: str, token: str | None) -> str:
    """A message without the token, should a service have sent it back."""
    return text.replace(token, "…") if token else text
