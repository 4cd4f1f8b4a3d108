"""Which examples an answer or a promise is about: by their texts, not by the name of a file that can change."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from microglia.tasks.base import Example


def fingerprint(examples: Sequence[Example], prompts: Sequence[str] = ()) -> str:
    """The same for the same examples, texts and all, in the same order and the same prompts; for no others."""
    return fingerprint_of([[asdict(example) for example in examples], list(prompts)])


def fingerprint_of(value: Any) -> str:
    """The same for equal values of JSON, and for no others."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def question_keys(questions: Iterable[str]) -> frozenset[str]:
    """Short hashes that tell questions apart, however they are spaced: a checkpoint keeps those that shaped it."""
    texts = (" ".join(question.split()) for question in questions)
    return frozenset(hashlib.sha256(text.encode()).hexdigest()[:8] for text in texts)
