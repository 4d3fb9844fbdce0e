"""One answer from an OpenAI-compatible server: /chat/completions for messages, /completions for
texts (https://platform.openai.com/docs/api-reference).

What may pass by itself is tried again, with pauses that double, or as long as `Retry-After` says.
The key stands in the header of the request and nowhere else. `RateLimit` holds to requests a
minute, and to pauses that the server demands.
"""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from trainer.responses.prompts import Prompt
from trainer.spec.responses import AnswersEndpoint, ResponsesSpec

# Share of the answers that may fail for good before the run stops; one may in any case.
FAILING = 0.02


def too_many(failed: int, total: int) -> bool:
    """Whether so many answers have failed that something is wrong with more than these."""
    return failed > max(1, int(FAILING * total))


class Stop(Exception):
    """A wait ended because a stop was asked for."""


class RateLimit:
    """Spaces requests of many threads evenly, `per_minute` of them in 60 s; None = no limit.

    clock: seconds that only grow. pause(seconds): waits, and returns True if a stop was asked for.
    """

    def __init__(
        self,
        per_minute: float | None,
        pause: Callable[[float], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spacing = 0.0 if per_minute is None else 60.0 / per_minute
        self._pause, self._clock = pause, clock
        self._lock = threading.Lock()
        self._next = self._held = clock()

    def wait(self) -> None:
        """Returns when this thread may send a request. Raises Stop."""
        while True:
            with self._lock:
                at = max(self._next, self._held, self._clock())
                self._next = at + self._spacing
            if self._pause(max(0.0, at - self._clock())):
                raise Stop
            if self._held <= at:  # else a pause was demanded meanwhile, and this turn is lost
                return

    def hold(self, seconds: float) -> None:
        """Nobody sends for so long."""
        with self._lock:
            self._held = max(self._held, self._clock() + seconds)


# A request is sent at most so often.
TRIES = 6
# Pause after the first failure, doubled after each further one, and the longest of all, in seconds.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 120.0
# How long a server may take for one answer, and for the connection, in seconds.
ANSWER_SECONDS, CONNECT_SECONDS = 600.0, 20.0
# Statuses that are tried again, and those that no other prompt would change.
PASSING = {408, 409, 425, 429}
FATAL = {301, 302, 307, 308, 401, 402, 403, 404, 405}
# What the server says, in an error.
SHOWN = 200


@dataclass(frozen=True)
class Reply:
    """A server's answer; `finish` is "stop" or "length", `tokens` None if it does not count."""

    text: str
    tokens: int | None
    finish: str


class Unanswered(Exception):
    """This prompt gets no answer; the others may."""


class ServerRefuses(ValueError):
    """No prompt would get an answer; one line."""


class _Passing(Exception):
    """A failure that may pass. after: seconds that the server wants to be left alone."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class Client:
    """Asks one server, from many threads.

    key: None where none is sent. pause(seconds): waits, True if a stop was asked for.
    """

    def __init__(
        self,
        origin: AnswersEndpoint,
        settings: ResponsesSpec,
        key: str | None,
        pause: Callable[[float], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.origin, self.settings = origin, settings
        self._key, self._pause = key, pause
        self.limit = RateLimit(origin.requests_per_minute, pause, clock)
        self._http = httpx.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=origin.concurrency),
        )

    def __repr__(self) -> str:
        return f"Client({self.origin.endpoint!r})"

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def ask(self, prompt: Prompt, sample: int) -> Reply:
        """The answer to a prompt. Raises Unanswered, ServerRefuses, Stop."""
        body = self.body(prompt, sample)
        why = ""
        for attempt in range(TRIES):
            self.limit.wait()
            try:
                return self._once(prompt, body)
            except _Passing as passing:
                why = str(passing)
                spread = 1.0 + 0.25 * random.random()  # not all come back at the same moment
                seconds = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * spread
                if passing.after is not None:
                    seconds = min(max(passing.after, 0.0), LONGEST_PAUSE)
                    self.limit.hold(seconds)
                if attempt + 1 < TRIES and self._pause(seconds):
                    raise Stop from None
        raise Unanswered(f"{why} ({TRIES} tries)")

    def body(self, prompt: Prompt, sample: int) -> dict[str, Any]:
        """The request; answers differ by the seed, for servers that heed it."""
        settings = self.settings
        what = "messages" if prompt.is_chat else "prompt"
        body: dict[str, Any] = {
            "model": self.origin.model,
            what: prompt.value,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
        }
        if settings.temperature > 0:
            digits = f"{settings.seed:016x}{prompt.answer_key(sample)}"
            body["seed"] = int(digits, 16) % (2**31 - 1)
        if settings.top_p < 1:
            body["top_p"] = settings.top_p
        return body

    def _once(self, prompt: Prompt, body: dict[str, Any]) -> Reply:
        path = "chat/completions" if prompt.is_chat else "completions"
        url = f"{self.origin.endpoint.rstrip('/')}/{path}"
        try:
            response = self._http.post(url, json=body)
        except httpx.RequestError as error:  # no connection, dropped, timed out
            raise _Passing(self._clean(f"{type(error).__name__}: {error}")) from None
        status = response.status_code
        if status in PASSING or status >= 500:
            raise _Passing(self._said(response), _retry_after(response))
        if status in FATAL:
            raise ServerRefuses(
                f"responses.from.endpoint: {url} refuses: {self._said(response)}; check endpoint, "
                "model and the key in the variable that api_key_env names"
            )
        if status != 200:
            raise Unanswered(self._said(response))
        try:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"] if prompt.is_chat else choice["text"]
            finish = choice.get("finish_reason")
            tokens = (response.json().get("usage") or {}).get("completion_tokens")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Passing(f"not the JSON of a completion: {self._said(response)}") from None
        if not isinstance(text, str) or finish not in ("stop", "length"):
            raise Unanswered(f"finish_reason {self._clean(str(finish))}, no text to learn from")
        return Reply(text, tokens if type(tokens) is int else None, finish)

    def _said(self, response: httpx.Response) -> str:
        return self._clean(f"HTTP {response.status_code}: {response.text}")

    def _clean(self, text: str) -> str:
        """One short line without the key, which some servers repeat."""
        if self._key:
            text = text.replace(self._key, "[key]")
        return " ".join(text.split())[:SHOWN]


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of the header Retry-After (RFC 9110, 10.2.3: a number or a date), if it is there."""
    value = response.headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return None
