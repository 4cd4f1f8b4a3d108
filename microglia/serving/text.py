"""Tokens become text while they are written: never half a character, never a part of a stop text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # what a decoder shows for a character whose last bytes are still to come


class GrowingText:
    """`add` gives the characters that a token makes certain; `rest` what was held back when nothing follows.

    All pieces together are the decoded tokens, up to the first stop text if there is one. A few tokens are decoded
    again at every step, not all of them, since what a token looks like can depend on its left neighbour.

    before: tokens that the text continues. SentencePiece shows no space in front of the first of all tokens, so a word
    that begins a completion would stick to its prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens = list(before)
        self.start, self.read = 0, len(before)  # of the window that is decoded, and how far it has become text
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """One more token → characters that are certain now; `stopped` is true once a stop text was found."""
        self.tokens.append(token)
        before = self._decode(self.start, self.read)
        now = self._decode(self.start, len(self.tokens))
        if now.endswith(HALF) or len(now) <= len(before):
            return ""
        self.start, self.read = self.read, len(self.tokens)
        return self._certain(now[len(before) :])

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped:
            return ""
        last = self._decode(self.start, len(self.tokens))[len(self._decode(self.start, self.read)) :]
        self.start = self.read = len(self.tokens)
        certain = self._certain(last)
        held, self.held = "" if self.stopped else self.held, ""
        return certain + held

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self.tokens[start:end], skip_special_tokens=True))

    def _certain(self, new: str) -> str:
        text, self.held = self.held + new, ""
        starts = [start for stop in self.stop if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped = True
            return text[: min(starts)]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
