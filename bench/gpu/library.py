"""A decode step of the library's own `generate`, as it is and compiled."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from microglia.benchmark.latency import Summary, summary

EAGER, COMPILED = "hf", "hf static compiled"
# What generate is asked for. The library compiles its step by itself where it has a static cache, on a GPU.
OPTIONS: dict[str, dict[str, Any]] = {EAGER: {}, COMPILED: {"cache_implementation": "static"}}


class Stamps(StoppingCriteria):
    """Stops nothing; notes when each step of a `generate` is over, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, list[Any]()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        if self.device.type == "cuda":
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step_ms(self) -> float:
        """Median time of a decode step. The first mark stands after the prefill.

        The median, because a new static cache makes the library's compiled step capture its graphs again.
        """
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            self.marks[-1].synchronize()
            return statistics.median(float(first.elapsed_time(second)) for first, second in pairs)
        return statistics.median((second - first) * 1e3 for first, second in pairs)


def library_step(lm: Any, ids: Tensor, variant: str, *, steps: int, rounds: int) -> tuple[Summary, float]:
    """Milliseconds of a step after prompts (B, T), and the seconds of the first call, with its compilation."""
    forget_caches(lm)
    mask, options = torch.ones_like(ids), OPTIONS[variant]

    def once() -> float:
        stamps = Stamps(ids.device)
        lm.generate(
            ids, attention_mask=mask, max_new_tokens=steps + 1, do_sample=False, eos_token_id=None, pad_token_id=0,
            stopping_criteria=[stamps], **options,
        )  # fmt: skip
        return stamps.step_ms()

    began = time.monotonic()
    once()
    first = time.monotonic() - began
    if variant == COMPILED:  # which settles in the second call
        once()
    samples = [once() for _ in range(rounds)]
    forget_caches(lm)
    return summary(samples), first


def forget_caches(lm: Any) -> None:
    """The library remembers the longest static cache of a model and makes every later one as long."""
    for memory in ("_previous_max_cache_length", "_cache"):
        vars(lm).pop(memory, None)
