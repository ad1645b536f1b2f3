"""An OpenAI-compatible endpoint: many requests at once, few of them twice, none of them lost."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from offline.errors import InputError

Body = dict[str, Any]
ATTEMPTS = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
TIMEOUT_S = 600.0  # per request: a long answer of a busy server takes minutes
BUSY = (429, 502, 503, 504)


class Endpoint:
    """One server.

    Attributes:
        url: its root, such as http://localhost:8000.
        concurrency: how many requests are under way at most.
    """

    def __init__(self, url: str, api_key: str | None = None, concurrency: int = 32) -> None:
        """Prepares requests to `url`; a trailing /v1 is understood.

        Raises:
            InputError: this is no http address.
        """
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"'{url}' is no address, expected such as http://localhost:8000")
        if concurrency < 1:
            raise InputError(f"--concurrency is {concurrency}, expected 1 or more")
        self.url = urlunsplit(parts)
        self.concurrency = concurrency
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    @property
    def name(self) -> str:
        """The address for reports, without a user's name and password."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def headers(self) -> dict[str, str]:
        """What other clients of this server must send along."""
        return dict(self._headers)

    def get(self, path: str) -> Any:
        """One answer as JSON; see `post_all` for errors."""
        return asyncio.run(self._run("GET", path, [None], lambda count: None))[0]

    def post_all(
        self,
        path: str,
        bodies: Sequence[Body],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[Any]:
        """Posts every body and returns the answers in their order.

        Args:
            on_done: told of every answer, with 1.

        Raises:
            InputError: the server refuses a request, or cannot be reached or is busy after
                several attempts; the message holds what it said.
        """
        return asyncio.run(self._run("POST", path, bodies, on_done))

    async def _run(
        self, method: str, path: str, bodies: Sequence[Body | None], on_done: Callable[[int], None]
    ) -> list[Any]:
        limit = asyncio.Semaphore(self.concurrency)
        limits = httpx.Limits(max_connections=self.concurrency)
        async with httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=TIMEOUT_S, limits=limits
        ) as client:

            async def one(body: Body | None) -> Any:
                async with limit:
                    answer = await self._attempts(client, method, path, body)
                on_done(1)
                return answer

            tasks = [asyncio.create_task(one(body)) for body in bodies]
            try:
                return await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise

    async def _attempts(
        self, client: httpx.AsyncClient, method: str, path: str, body: Body | None
    ) -> Any:
        reason = ""
        for attempt in range(ATTEMPTS):
            wait = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)
            try:
                response = await client.request(method, path, json=body)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__} {error}".strip()
            else:
                if response.status_code == 200:
                    return self._json(response, path)
                reason = f"HTTP {response.status_code}: {message(response)}"
                if response.status_code not in BUSY:
                    raise Refused(f"{self.name}{path}: {reason}", response)
                wait = _asked_wait(response.headers, wait)
            if attempt < ATTEMPTS - 1:
                await asyncio.sleep(wait)
        raise InputError(f"{self.name}{path}: no answer after {ATTEMPTS} attempts ({reason})")

    def _json(self, response: httpx.Response, path: str) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise InputError(f"{self.name}{path}: the answer is not JSON ({error})") from error


class Refused(InputError):
    """The server answered, and the answer is no."""

    def __init__(self, text: str, response: httpx.Response) -> None:
        super().__init__(text)
        self.status = response.status_code
        self.reason = message(response)


def message(response: httpx.Response) -> str:
    """What an error response says, as text."""
    try:
        error = response.json()
    except ValueError:
        return response.text[:500]
    for key in ("error", "message"):
        if isinstance(error, Mapping) and key in error:
            error = error[key]
    return str(error)[:500]


def _asked_wait(headers: Mapping[str, str], wait: float) -> float:
    """The server's own wish in seconds, within reason."""
    try:
        return min(max(float(headers.get("retry-after", wait)), 0.0), LONGEST_WAIT_S)
    except ValueError:
        return wait
