"""The events of the model's thread become OpenAI's answers and chunks on the event loop."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from microglia.serving import schema as s
from microglia.serving.job import Event, Failed, Finished, Job, Piece
from microglia.serving.metrics import Metrics
from microglia.serving.refusal import Refusal
from microglia.serving.worker import STOPPED


class PendingRequest:
    """One request: its jobs, and the queue through which their events come over from the model's thread."""

    def __init__(self, model: str, chat: bool, metrics: Metrics) -> None:
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        self.jobs: list[Job] = []
        self.chat, self.metrics = chat, metrics
        self.identity: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def receiver(self, index: int) -> Callable[[Event], None]:
        """A function that takes the events of job `index`, on any thread."""

        def receive(event: Event) -> None:
            if isinstance(event, Finished):
                self.metrics.finished(self.jobs[index], event)
            with suppress(RuntimeError):  # the loop is closed: the server was ended by force and nobody listens
                self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

        return receive

    @property
    def answered(self) -> bool:
        """Whether the model has written all that was asked for."""
        return bool(self.jobs) and all(job.ended for job in self.jobs)

    def cut(self) -> None:
        """Tell the client that the server ends, behind what was written so far."""
        self.queue.put_nowait((0, Failed(STOPPED, 503)))
        self.cancel()

    def cancel(self) -> None:
        """Nobody waits any more: let the model write no further. Nothing happens after a whole answer."""
        for job in self.jobs:
            if not (job.ended or job.cancelled):
                job.cancelled = True
                self.metrics.answers.labels("cut").inc()

    async def events(self) -> AsyncIterator[tuple[int, Piece | Finished]]:
        """Every event until the last job has finished. Raises Refusal when one fails."""
        open_jobs = len(self.jobs)
        while open_jobs:
            index, event = await self.queue.get()
            if isinstance(event, Failed):
                raise Refusal(event.status, event.sentence, code="stopping" if event.status == 503 else None)
            open_jobs -= isinstance(event, Finished)
            yield index, event

    async def answer(self) -> s.ChatCompletion | s.Completion:
        """The whole answer at once."""
        texts = [""] * len(self.jobs)
        ends: dict[int, Finished] = {}
        async for index, event in self.events():
            if isinstance(event, Piece):
                texts[index] += event.text
            else:
                ends[index] = event
        usage = self.usage(ends)
        if self.chat:
            choice = s.ChatChoice(message=s.ChatMessage(content=texts[0]), finish_reason=ends[0].reason)
            return s.ChatCompletion(choices=[choice], usage=usage, **self.identity)
        choices = [
            s.CompletionChoice(index=index, text=text, finish_reason=ends[index].reason)
            for index, text in enumerate(texts)
        ]
        return s.Completion(choices=choices, usage=usage, **self.identity)

    async def stream(self, with_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events. What fails after the first of them is an error object among them."""
        ends: dict[int, Finished] = {}
        try:
            if self.chat:
                yield self.chunk(s.ChunkChoice(delta=s.Delta(role="assistant", content="")))
            async for index, event in self.events():
                if isinstance(event, Finished):
                    ends[index] = event
                text, reason = (event.text, None) if isinstance(event, Piece) else ("", event.reason)
                if self.chat:
                    delta = s.Delta() if reason else s.Delta(content=text)
                    yield self.chunk(s.ChunkChoice(delta=delta, finish_reason=reason))
                else:
                    yield self.chunk(s.CompletionChoice(index=index, text=text, finish_reason=reason))
        except Refusal as refusal:
            yield _server_sent(refusal.body)
            return
        if with_usage:
            yield self.chunk(usage=self.usage(ends))
        yield "data: [DONE]\n\n"

    def chunk(self, *choices: BaseModel, usage: s.Usage | None = None) -> str:
        kind = s.ChatChunk if self.chat else s.Completion
        chunk = kind(**self.identity, choices=choices, usage=usage).model_dump()  # type: ignore[arg-type]
        for choice in chunk["choices"]:
            if "delta" in choice:  # a chunk leaves out what it does not add
                choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
        return _server_sent(chunk)

    def usage(self, ends: dict[int, Finished]) -> s.Usage:
        """Sums over the request's prompts; seconds of the slowest."""
        prompt_tokens = sum(job.prompt_tokens for job in self.jobs)
        completion_tokens = sum(end.completion_tokens for end in ends.values())
        heads_kept, heads = sum(end.heads_kept for end in ends.values()), sum(end.heads for end in ends.values())
        return s.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            sparsity=1 - heads_kept / heads,
            heads_kept=heads_kept,
            heads=heads,
            queued_seconds=round(max(end.queued_seconds for end in ends.values()), 6),
            seconds=round(max(end.seconds for end in ends.values()), 6),
        )


def _server_sent(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
