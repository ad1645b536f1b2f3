"""An OpenAI-compatible endpoint: many requests at once, few of them twice, none of them lost.

Whoever answers may be anything. What it says is read up to a limit of size and time and checked
against a form before anybody uses it; all else is an InputError that names the address.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx
from pydantic import BaseModel, ValidationError

from offline.errors import InputError
from offline.report.text import shortened

Body = dict[str, Any]
ATTEMPTS = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
TIMEOUT_S = 600.0  # per request: a long answer of a busy server takes minutes
LARGEST = 2**27  # bytes of an answer; the scores of a million tokens have fewer
LONGEST_REFUSAL = 2**16  # bytes that are read of a refusal
BUSY = (429, 502, 503, 504)
_Form = TypeVar("_Form", bound=BaseModel)
_Read = TypeVar("_Read")
_Client = TypeVar("_Client", httpx.Client, httpx.AsyncClient)


class Endpoint:
    """One server.

    Attributes:
        url: its root, such as http://localhost:8000.
        concurrency: how many requests are under way at most.
        timeout_s: how long an answer may take.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        concurrency: int = 32,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Prepares requests to `url`; a trailing /v1 is understood.

        Raises:
            InputError: this is no http address, or no key that can be sent.
        """
        self.url = _root(url)
        if concurrency < 1:
            raise InputError(f"--concurrency is {concurrency}, expected 1 or more")
        if api_key and not re.fullmatch("[!-~]+", api_key):
            raise InputError("the API key holds a space or a character that is not ASCII")
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    @property
    def name(self) -> str:
        """The address for reports, without a user's name and password."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def get(self, path: str, form: type[_Form]) -> _Form:
        """One answer; see `post_all` for errors."""
        asked = self.exchange("GET", path, [None], form, lambda _, answer: answer)
        return asyncio.run(asked)[0]

    def post_all(
        self,
        path: str,
        bodies: Sequence[Body],
        form: type[_Form],
        read: Callable[[int, _Form], _Read],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[_Read]:
        """Posts every body and returns what is read of the answers, in their order.

        Args:
            form: what an answer must look like.
            read: what is wanted of an answer, given its number too; its ValueErrors say that the
                answer does not belong to the request.
            on_done: told of every answer, with 1.

        Raises:
            InputError: the server refuses a request (`Refused`), cannot be reached or is busy
                after several attempts, or answers something else; the message holds what it said.
        """
        return asyncio.run(self.exchange("POST", path, bodies, form, read, on_done))

    async def exchange(
        self,
        method: str,
        path: str,
        bodies: Sequence[Body | None],
        form: type[_Form],
        read: Callable[[int, _Form], _Read],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[_Read]:
        """`post_all` for those who have an event loop."""
        limit = asyncio.Semaphore(self.concurrency)
        async with self._client(httpx.AsyncClient) as client:

            async def one(number: int, body: Body | None) -> _Read:
                async with limit:
                    payload = await self._attempts(client, method, path, body)
                with self._checked(path, payload):
                    found = read(number, form.model_validate_json(payload))
                on_done(1)
                return found

            tasks = [asyncio.create_task(one(*asked)) for asked in enumerate(bodies)]
            try:
                return await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise

    def post(
        self, path: str, body: Body, form: type[_Form], read: Callable[[_Form], _Read]
    ) -> _Read:
        """Posts one body, on a connection that later ones share; errors as `post_all`."""
        try:
            payload = self._once(path, body)
        except Refused as error:
            if error.status in BUSY:
                return self.post_all(path, [body], form, lambda _, answer: read(answer))[0]
            raise
        with self._checked(path, payload):
            return read(form.model_validate_json(payload))

    def stream(
        self, path: str, body: Body, form: type[_Form], read: Callable[[list[_Form]], _Read]
    ) -> _Read:
        """Posts one body that asks for a stream, and reads its events; errors as `post`."""
        payload = self._once(path, body)
        events = [line[6:].strip() for line in payload.splitlines() if line.startswith(b"data: ")]
        with self._checked(path, payload):
            return read([form.model_validate_json(e) for e in events if e != b"[DONE]"])

    def refusal(self, path: str, body: Body) -> "Refused | None":
        """What the server says against a body, or None if it takes it."""
        try:
            self._once(path, body)
        except Refused as error:
            return error
        return None

    async def _attempts(
        self, client: httpx.AsyncClient, method: str, path: str, body: Body | None
    ) -> bytes:
        reason = ""
        for attempt in range(ATTEMPTS):
            wait = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)
            try:
                with self._named(path):
                    async with client.stream(method, path, json=body) as response:
                        answer = _Answer(f"{self.name}{path}", response, self.timeout_s)
                        async for part in response.aiter_raw():
                            if answer.is_enough_with(part):
                                break
                        return answer.accepted()
            except httpx.TransportError as error:
                reason = _words(error)
            except Refused as error:
                if error.status not in BUSY:
                    raise
                reason = f"HTTP {error.status}: {error.reason}"
                wait = _asked_wait(error.headers, wait)
            if attempt < ATTEMPTS - 1:
                await asyncio.sleep(wait)
        raise InputError(f"{self.name}{path}: no answer after {ATTEMPTS} attempts ({reason})")

    def _once(self, path: str, body: Body) -> bytes:
        try:
            with self._named(path), self._kept.stream("POST", path, json=body) as response:
                answer = _Answer(f"{self.name}{path}", response, self.timeout_s)
                for part in response.iter_raw():
                    if answer.is_enough_with(part):
                        break
                return answer.accepted()
        except httpx.TransportError as error:
            raise InputError(f"{self.name}{path}: {_words(error)}") from error

    @cached_property
    def _kept(self) -> httpx.Client:
        # A new connection takes longer than a tiny model.
        return self._client(httpx.Client)

    def _client(self, kind: type[_Client]) -> _Client:
        # Nothing compressed: what is read is as large as what was sent.
        headers = {**self._headers, "Accept-Encoding": "identity"}
        limits = httpx.Limits(max_connections=self.concurrency)
        try:
            return kind(base_url=self.url, headers=headers, timeout=self.timeout_s, limits=limits)
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            # The rest was checked.
            raise InputError(f"{self.name}: HTTP_PROXY or ALL_PROXY: {error}") from error

    @contextmanager
    def _named(self, path: str) -> Iterator[None]:
        """Puts the address before errors that no other attempt would mend."""
        try:
            yield
        except (httpx.TransportError, InputError):
            raise
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise InputError(f"{self.name}{path}: {_words(error)}") from error

    @contextmanager
    def _checked(self, path: str, payload: bytes) -> Iterator[None]:
        """Where every answer is read: what it does not hold is an error that names the address."""
        try:
            yield
            return
        except InputError:
            raise
        except ValidationError as error:
            words = _first(error)
        except ValueError as error:
            words = str(error)
        start = payload[:60].decode(errors="replace")
        raise InputError(
            f"{self.name}{path}: not the answer that was expected ({words}); it begins {start!r}"
        )


class Refused(InputError):
    """The server answered, and the answer is no."""

    def __init__(
        self, where: str, status: int, reason: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"{where}: HTTP {status}: {reason}")
        self.status = status
        self.reason = reason
        self.headers = headers or {}


class _Answer:
    """What arrives of one response, within limits.

    Raises:
        InputError: it is too large, takes too long, or is encoded.
    """

    def __init__(self, where: str, response: httpx.Response, timeout_s: float) -> None:
        self.where, self.status, self.headers = where, response.status_code, response.headers
        self._deadline = time.monotonic() + timeout_s
        self._payload = bytearray()
        encoding = self.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise InputError(f"{where}: the answer is in {encoding!r}, which was not asked for")

    def is_enough_with(self, part: bytes) -> bool:
        """Adds a part; true where nobody would read further."""
        self._payload += part
        if time.monotonic() > self._deadline:
            raise InputError(f"{self.where}: the answer did not end in time")
        if self.status == 200 and len(self._payload) > LARGEST:
            raise InputError(f"{self.where}: the answer is larger than {LARGEST} bytes")
        return self.status != 200 and len(self._payload) > LONGEST_REFUSAL

    def accepted(self) -> bytes:
        """What was said; raises Refused unless it is an answer."""
        if self.status != 200:
            reason = _message(bytes(self._payload)) or self.headers.get("location", "")
            raise Refused(self.where, self.status, reason, self.headers)
        return bytes(self._payload)


def _message(payload: bytes) -> str:
    """What a refusal says, as a line of text."""
    try:
        error = json.loads(payload)
        for key in ("error", "message"):
            if isinstance(error, Mapping) and key in error:
                error = error[key]
        return shortened(error, 500)
    except (ValueError, RecursionError):
        return shortened(payload.decode(errors="replace"), 500)


def _first(error: ValidationError) -> str:
    """The first thing that a form misses, and where."""
    found = error.errors(include_url=False, include_input=False)[0]
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in found["loc"])
    return f"{place.removeprefix('.')}: {found['msg']}" if place else found["msg"]


def _words(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()


def _root(url: str) -> str:
    """The address of a server, without a trailing /v1."""
    try:
        httpx.URL(url)
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except (ValueError, httpx.InvalidURL) as error:
        raise InputError(f"'{url}' is no address ({error})") from error
    if not known or parts.query or parts.fragment:
        raise InputError(f"'{url}' is no address, expected such as http://localhost:8000")
    return urlunsplit(parts)


def _asked_wait(headers: Mapping[str, str], wait: float) -> float:
    """The server's own wish in seconds, within reason."""
    try:
        asked = float(headers.get("retry-after", wait))
    except ValueError:
        return wait
    return min(asked, LONGEST_WAIT_S) if asked >= 0 else wait
