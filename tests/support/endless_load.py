"""Answers that stream all the time: whenever one ends, the next one begins.

Clients do what a careful one does: when a gateway goes away they ask another one for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx

from support.streams import TIMEOUT, Answer, body_of, stream
from support.waiting import eventually

_AGAIN_S = 0.1
_PASSING = ("draining", "scheduler_unavailable", "no_workers")


class EndlessLoad:
    """`count` streams at a time, each with a seed of its own, of `tokens` tokens."""

    def __init__(
        self,
        urls: Callable[[], Sequence[str]],
        count: int,
        tokens: int,
        model: str = "tiny",
        *,
        words: int = 0,
        patience_s: float = 60.0,
    ) -> None:
        """`urls`: of the gateways that run, asked for each time. words: of ten bytes, that make
        prompts longer. patience_s: for an answer."""
        self._patience_s = patience_s
        self._words = " and again" * words
        self._urls, self._count, self._tokens, self._model = urls, count, tokens, model
        self.expected: list[str] = []
        self.complete = [0] * count  # answers that ended, by stream
        self.reattached = 0
        self.refused: Counter[str] = Counter()  # of newcomers, by code
        self._live = [(Answer(), Answer())] * count  # what came before, and from the gateway now
        self._stop = False

    def body(self, seed: int) -> dict[str, Any]:
        return body_of(
            f"Once upon a time number {seed}{self._words}",
            self._tokens,
            model=self._model,
            seed=seed,
            temperature=2.0,
            top_k=4,
        )

    async def learn(self) -> None:
        """What the answers are when nothing happens."""
        answers = [self._whole(seed) for seed in range(self._count)]
        self.expected = [answer.text for answer in await asyncio.gather(*answers)]
        assert len(set(self.expected)) == self._count

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Raises AssertionError for an answer that is not what it should be."""
        async with asyncio.TaskGroup() as group:
            for seed in range(self._count):
                group.create_task(self._forever(seed))
            yield
            self._stop = True

    async def rounds(self, answers: int = 1) -> None:
        """Wait until each stream has completed so many more."""
        goal = [done + answers for done in self.complete]
        await eventually(
            lambda: all(done >= wanted for done, wanted in zip(self.complete, goal, strict=True)),
            "an answer of every stream",
            answers * self._patience_s,
        )

    async def middle(self) -> None:
        """Wait until half of the streams are neither at the first nor at the last tenth of their
        answer. (Of streams that go their own ways that is always so.)"""

        def begun(before: Answer, now: Answer) -> bool:
            tenths = 10 * (len(before.ids) + len(now.ids))
            return self._tokens <= tenths < 9 * self._tokens

        await eventually(
            lambda: sum(begun(*live) for live in self._live) >= self._count / 2,
            "streams in the middle",
            self._patience_s,
        )

    async def _forever(self, seed: int) -> None:
        while not self._stop:
            answer = await self._whole(seed)
            assert answer.text == self.expected[seed], f"stream {seed} changed"
            self.complete[seed] += 1

    async def _whole(self, seed: int) -> Answer:
        """One answer, from as many gateways as it takes."""
        whole = Answer()
        async with asyncio.timeout(self._patience_s):
            for attempt in range(10_000):
                urls = self._urls()
                if urls and await self._part(urls[(seed + attempt) % len(urls)], seed, whole):
                    break
                await asyncio.sleep(_AGAIN_S)
        assert whole.usage["completion_tokens"] == self._tokens, whole
        assert whole.ids == sorted(set(whole.ids)), f"a token twice: {whole.ids}"
        assert whole.ids[-1] == self._tokens - 1
        return whole

    async def _part(self, url: str, seed: int, whole: Answer) -> bool:
        """As much as this gateway gives; True if that was the end."""
        headers = {}
        if whole.response_id and whole.ids:
            headers = {"X-FastServe-Answer": whole.response_id, "Last-Event-ID": str(whole.ids[-1])}
        part = Answer()
        self._live[seed] = (whole, part)
        try:
            async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as http:
                reply = await stream(http, self.body(seed), part, headers=headers, refusals=True)
        except httpx.TransportError:
            reply = part
        self.reattached += bool(headers) and bool(part.response_id)
        whole.text += part.text
        whole.ids += part.ids
        whole.response_id = whole.response_id or part.response_id
        whole.usage = reply.usage or whole.usage
        if part.error is not None:
            assert part.error["code"] in _PASSING, part.error
            self.refused[part.error["code"]] += 1
            return False
        return part.finish is not None and bool(part.usage)
