"""All answers from a server: many requests at once, published now and then, resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from threading import Event, Thread
from typing import Any

from trainer.responses.client import Client, Reply, Unanswered, too_many
from trainer.responses.prompts import Prompt, read_prompts
from trainer.responses.store import Answer, AnswerStore
from trainer.spec.responses import AnswersEndpoint, ResponsesSpec
from trainer.spec.sections import DataSpec
from trainer.worker import Hooks, Stopped

# Answers are published at least so often, and progress is told at most so often, in seconds.
PUBLISH_SECONDS, PROGRESS_SECONDS = 20.0, 1.0
# Requests under way when the run ends are waited for so long, as they are paid for, in seconds.
LAST_SECONDS = 5.0
# Reasons of failures that the manifest quotes.
QUOTED = 5


def api_key(origin: AnswersEndpoint, environ: Mapping[str, str] = os.environ) -> str | None:
    """The key that the spec's variable holds. Raises ValueError, one line, if it is not set."""
    if origin.api_key_env is None:
        return None
    key = environ.get(origin.api_key_env, "").strip()
    if not key:
        raise ValueError(
            f"responses.from.api_key_env: the environment variable {origin.api_key_env} is not "
            "set here; export it, or leave api_key_env out for a server without keys"
        )
    return key


def ask_all(
    responses: ResponsesSpec,
    data: DataSpec,
    answers: AnswerStore,
    hooks: Hooks,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Asks for every answer that is missing; returns facts for the manifest.

    Raises Stopped after a clean stop, ValueError (one line) where the server refuses or too many
    answers fail. What was answered is published in every case.
    """
    origin = responses.origin
    assert isinstance(origin, AnswersEndpoint)
    prompts = read_prompts(data)
    there = answers.keys()
    work = [
        (prompt, sample)
        for prompt in prompts
        for sample in range(responses.samples)
        if prompt.answer_key(sample) not in there
    ]
    total = len(prompts) * responses.samples
    run = _Run(answers, hooks, total, clock)
    stopping = Event()
    client = Client(origin, responses, api_key(origin), stopping.wait)
    try:
        run.all(client, work, origin.concurrency)
    finally:
        stopping.set()  # ends pauses
        run.rest()
        client.close()
    return {"counts": {"prompts": len(prompts), "failed": len(run.failed)}, "failed": run.quoted()}


class _Run:
    """The answers of this run: those to be published, and those that failed."""

    def __init__(
        self, answers: AnswerStore, hooks: Hooks, total: int, clock: Callable[[], float]
    ) -> None:
        self.answers, self.hooks, self.total, self.clock = answers, hooks, total, clock
        self.failed: list[str] = []
        self.made: list[Answer] = []
        self.waiting: dict[Future[Reply], tuple[Prompt, int]] = {}
        self.done = self.tokens = 0
        self.began = self.published = clock()
        self.told = -PROGRESS_SECONDS

    def all(self, client: Client, work: list[tuple[Prompt, int]], at_once: int) -> None:
        """Works through `work`, until a stop is asked for or too much fails."""
        self.done = self.total - len(work)
        queue = iter(work)
        while True:
            if self.hooks.stop_requested():
                raise Stopped("prepare stopped; the answers are saved")
            while len(self.waiting) < at_once and (item := next(queue, None)) is not None:
                self.waiting[_under_way(client, *item)] = item
            if not self.waiting:
                return
            finished, _ = wait(self.waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                self.take(future)
            if too_many(len(self.failed), self.total):
                raise ValueError(
                    f"responses.from.endpoint: {len(self.failed)} of {self.total} answers failed "
                    f"for good, the last with: {self.failed[-1]}; the others are kept, mend the "
                    "cause and run again"
                )
            if self.clock() - self.published >= PUBLISH_SECONDS:
                self.publish()
            self.progress()

    def take(self, future: Future[Reply]) -> None:
        """One request has ended."""
        prompt, sample = self.waiting.pop(future)
        try:
            reply = future.result()
        except Unanswered as error:
            self.failed.append(str(error))
            return
        self.done += 1
        self.tokens += reply.tokens or 0
        self.made.append(
            Answer(
                prompt.answer_key(sample),
                prompt.source,
                sample,
                prompt.value,
                prompt.completion(reply.text),
                reply.tokens,
                reply.finish,
            )
        )

    def rest(self) -> None:
        """What has been answered since, whatever ended the run; what takes longer is left, and
        asked for again by the next one."""
        finished, _ = wait(self.waiting, timeout=LAST_SECONDS)
        for future in finished:
            if future.exception() is None:
                self.take(future)
        self.publish()

    def publish(self) -> None:
        """Makes the answers so far last."""
        self.hooks.fence()
        self.answers.publish(self.made, self.hooks.attempt, 0)
        self.made = []
        self.published = self.clock()

    def progress(self) -> None:
        """Tells how far it is."""
        now = self.clock()
        if now - self.told < PROGRESS_SECONDS and self.done < self.total:
            return
        self.told = now
        self.hooks.emit(
            "progress",
            stage="prepare",
            part="answers",
            done=self.done,
            total=self.total,
            unit="answers",
            tokens_per_s=self.tokens / max(now - self.began, 1e-9),
        )

    def quoted(self) -> list[str]:
        """The first reasons why answers failed."""
        return self.failed[:QUOTED]


def _under_way(client: Client, prompt: Prompt, sample: int) -> Future[Reply]:
    """A request in a thread of its own that the end of the process does not wait for, as it would
    for those of a pool: a server may take minutes."""
    future: Future[Reply] = Future()

    def ask() -> None:
        try:
            future.set_result(client.ask(prompt, sample))
        except BaseException as error:  # told to whoever takes the result
            future.set_exception(error)

    Thread(target=ask, name="answers", daemon=True).start()
    return future
