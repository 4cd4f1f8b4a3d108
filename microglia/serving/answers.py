"""What the model tells, on its thread, becomes OpenAI's answers and chunks, on the event loop."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from microglia.serving import schema as s
from microglia.serving.job import Event, Failed, Finished, Job, Piece
from microglia.serving.refusal import Refusal


class Asked:
    """One request: its jobs, and the queue through which their events come over from the model's thread."""

    def __init__(self, model: str, chat: bool) -> None:
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        self.jobs: list[Job] = []
        self.model, self.chat = model, chat
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def tell(self, index: int) -> Callable[[Event], None]:
        """Whom job `index` tells; from any thread."""

        def put(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server was ended by force and nobody listens
                self.loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        return put

    def cancel(self) -> int:
        """Nobody waits any more: let the model write no further. Returns how many answers were cut."""
        cut = [job for job in self.jobs if not (job.ended or job.cancelled)]
        for job in cut:
            job.cancelled = True
        return len(cut)

    async def told(self) -> AsyncIterator[tuple[int, Piece | Finished]]:
        """Every event until the last job has finished. Raises Refusal when one fails."""
        open_jobs = len(self.jobs)
        while open_jobs:
            index, event = await self.events.get()
            if isinstance(event, Failed):
                raise Refusal(500, event.sentence)
            open_jobs -= isinstance(event, Finished)
            yield index, event

    async def answer(self) -> s.ChatCompletion | s.Completion:
        """The whole answer at once."""
        texts = [""] * len(self.jobs)
        ends: dict[int, Finished] = {}
        async for index, event in self.told():
            if isinstance(event, Piece):
                texts[index] += event.text
            else:
                ends[index] = event
        usage = self.usage(ends)
        about: dict[str, Any] = {"id": self.id, "created": self.created, "model": self.model, "usage": usage}
        if self.chat:
            message = s.ChatMessage(content=texts[0])
            return s.ChatCompletion(choices=[s.ChatChoice(message=message, finish_reason=ends[0].reason)], **about)
        choices = [
            s.CompletionChoice(index=index, text=text, finish_reason=ends[index].reason)
            for index, text in enumerate(texts)
        ]
        return s.Completion(choices=choices, **about)

    async def stream(self, with_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events. What fails after the first of them is an error object among them."""
        ends: dict[int, Finished] = {}
        try:
            if self.chat:
                yield self.chunk(s.ChunkChoice(delta=s.Delta(role="assistant", content="")))
            async for index, event in self.told():
                if isinstance(event, Finished):
                    ends[index] = event
                text, reason = (event.text, None) if isinstance(event, Piece) else ("", event.reason)
                if self.chat:
                    delta = s.Delta() if reason else s.Delta(content=text)
                    yield self.chunk(s.ChunkChoice(delta=delta, finish_reason=reason))
                else:
                    yield self.chunk(s.CompletionChoice(index=index, text=text, finish_reason=reason))
        except Refusal as refused:
            yield _sent(refused.body)
            return
        if with_usage:
            yield self.chunk(usage=self.usage(ends))
        yield "data: [DONE]\n\n"

    def chunk(self, *choices: BaseModel, usage: s.Usage | None = None) -> str:
        kind = s.ChatChunk if self.chat else s.Completion
        whole = kind(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage).model_dump()  # type: ignore[arg-type]
        for choice in whole["choices"]:
            if "delta" in choice:  # what a chunk does not bring is not there
                choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
        return _sent(whole)

    def usage(self, ends: dict[int, Finished]) -> s.Usage:
        """Sums over the request's prompts; seconds of the slowest."""
        prompt = sum(job.prompt_tokens for job in self.jobs)
        completion = sum(end.completion_tokens for end in ends.values())
        kept, heads = sum(end.heads_kept for end in ends.values()), sum(end.heads for end in ends.values())
        return s.Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            sparsity=1 - kept / heads,
            heads_kept=kept,
            heads=heads,
            queued_seconds=_slowest([end.queued_seconds for end in ends.values()]),
            seconds=_slowest([end.seconds for end in ends.values()]),
        )


def _slowest(seconds: Sequence[float]) -> float:
    return round(max(seconds), 6)


def _sent(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
