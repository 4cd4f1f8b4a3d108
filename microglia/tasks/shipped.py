"""Short prompts of our own making that come with the package: questions, rewriting, chat, code and lists.

For whoever has a model and no data: to train on without labels, to calibrate, and to judge how close a pruned model
stays to the dense one. They have no gold answers; the model's own are what counts.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from microglia.errors import check_choice
from microglia.tasks.base import Example

KINDS = ("question", "rewriting", "chat", "code", "list")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ShippedPrompt:
    """What a user might ask, and of which of the KINDS that is."""

    kind: str
    prompt: str


def shipped_prompts(split: str) -> list[ShippedPrompt]:
    """The prompts of a split, kinds mixed, always in the same order. Raises ConfigError for an unknown split."""
    check_choice("split", split, SPLITS)
    return [ShippedPrompt(row["kind"], row["prompt"]) for row in _rows() if row["split"] == split]


def shipped_examples(split: str, task: str) -> list[Example]:
    """The prompts of a split as examples of a task, with nothing to say about what is right."""
    prompts = enumerate(shipped_prompts(split))
    return [Example(f"{task}/{split}/{index}", row.prompt, "", "", 0, row.kind) for index, row in prompts]


@lru_cache(maxsize=1)
def _rows() -> list[dict[str, str]]:
    text = (resources.files("microglia.tasks") / "shipped.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
