"""One prompt on its way through the server, and what is told about it while its answer is written."""

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
    """Which jobs may share a batch: those whose prompts are pruned alike. threshold None leaves the model dense."""

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
    """No answer: a sentence that says why, for the one who asked."""

    sentence: str


Event = Piece | Finished | Failed


@dataclass(eq=False)
class Job:
    """A prompt, ready for the model, and whom to tell. `tell` is called on the model's thread and must not block.

    cancelled: set from any thread when nobody waits for the answer any more; the model then writes no further.
    counts: kept heads per site, where batches are formed by decision; None as long as nobody looked.
    """

    prompt: str
    prompt_tokens: int
    pruning: Pruning
    sampling: Sampling
    tell: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    told: bool = False  # whether any character of the answer has left
    ended: bool = False
    counts: tuple[int, ...] | None = None

    def piece(self, text: str) -> None:
        """Tell the next characters, if there are any and somebody listens."""
        if text and not self.cancelled:
            self.told = True
            self.tell(Piece(text))

    def end(self, event: Finished | Failed) -> None:
        """Tell the end, once."""
        if not self.ended:
            self.ended = True
            if not self.cancelled:
                self.tell(event)
