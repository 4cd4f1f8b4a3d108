"""One prompt on its way through the server, and the events that its answer is made of."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are drawn and where it ends. temperature 0 is greedy; seed None is a fresh one."""

    COLDEST: ClassVar[float] = 1e-3  # below it the division would overflow, and the likeliest token is drawn anyway

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature < self.COLDEST


@dataclass(frozen=True)
class Pruning:
    """Jobs of equal pruning may share a batch. threshold None leaves the model dense."""

    threshold: float | None


@dataclass(frozen=True)
class Piece:
    """The next characters of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of an answer: reason is `stop` (the model or a stop text ended it) or `length`."""

    reason: Reason
    completion_tokens: int
    heads_kept: int
    heads: int
    queued_seconds: float
    seconds: float  # from reading the prompt to the last token


@dataclass(frozen=True)
class Failed:
    """No answer: a sentence that says why, for the client, and its HTTP status."""

    sentence: str
    status: Literal[500, 503] = 500


Event = Piece | Finished | Failed


@dataclass(eq=False)
class Job:
    """A prompt, ready for the model. `emit` takes its events; it is called on the model's thread and must not block.

    cancelled: set from any thread when nobody waits for the answer any more; the model then writes no further.
    kept_heads: per site, where batches are formed by decision; None as long as they have not been counted. mask: the
    same for which heads they are, equal for prompts that keep the same ones.
    """

    prompt: str
    prompt_tokens: int
    pruning: Pruning
    sampling: Sampling
    emit: Callable[[Event], None]
    arrival: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    has_output: bool = False  # whether any character of the answer has left
    ended: bool = False
    kept_heads: tuple[int, ...] | None = None
    mask: bytes = b""

    def emit_text(self, text: str) -> None:
        """Emit the next characters, if there are any and somebody waits for them."""
        if text and not self.cancelled:
            self.has_output = True
            self.emit(Piece(text))

    def end(self, event: Finished | Failed) -> None:
        """Emit the end, once."""
        if not self.ended:
            self.ended = True
            if not self.cancelled:
                self.emit(event)
