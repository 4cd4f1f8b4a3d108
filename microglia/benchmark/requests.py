"""Whole requests on a fixed set of prompts, the same for whoever is timed: what a decision costs beside what it saves.

A request reads its prompt and writes as many tokens as its answer has, so long answers count for more, as time is spent
per token. Its parts are timed one by one and charged to who needs them:

- reading the prompt: everybody; with statistics where the policy decides by them.
- decision, and slicing of weights and cache: whoever decides for each prompt. A static mask is decided on and sliced
  once for all requests, so neither is charged to it.
- decode steps: everybody.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from microglia.anatomy import causal_lm, context_length
from microglia.benchmark.ceiling import ceiling, realised_share
from microglia.benchmark.costs import costs
from microglia.benchmark.latency import Clock, interleaved, paired_ratio, summary
from microglia.errors import ConfigError, DataError
from microglia.execution import Decision, Dense, Execution, Request, execution_for, kind_of
from microglia.gate import keep_ratio
from microglia.pruner import Pruner
from microglia.reading import encode_prompts
from microglia.results import Latency, RequestTime
from microglia.signals import Prompt, measured
from microglia.units.kv import kv_bytes

PROMPTS = 12  # of a fixed set, unless it is told otherwise
ONCE, EACH = ("reading", "steps"), ("reading", "decision", "slicing", "steps")  # what is charged


@dataclass(frozen=True)
class TimedPrompt:
    """A prompt's ids (1, T), and how many tokens its answer has."""

    ids: Tensor
    tokens: int


@dataclass(frozen=True)
class TimedRun:
    """What was measured of one pruner, one number per repetition, each a sum over the prompts in milliseconds.

    dense, pruned: whole requests as they are charged; dense_steps, steps: decode steps alone. parts: means per request,
    also of what is not charged. bytes: of all decode steps, dense and pruned. keep_ratio: by the answers' tokens.
    """

    dense: list[float]
    pruned: list[float]
    dense_steps: list[float]
    steps: list[float]
    parts: dict[str, float]
    charged: tuple[str, ...]
    prompts: int
    tokens: int
    keep_ratio: float
    kv_bytes: float
    bytes: tuple[int, int]

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "TimedRun":
        """What `asdict` gave, after JSON."""
        return cls(**{**row, "charged": tuple(row["charged"]), "bytes": tuple(row["bytes"])})


def fixed_prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answer_tokens: Sequence[int],
    *,
    count: int = PROMPTS,
    seed: int = 0,
) -> list[TimedPrompt]:
    """So many of the prompts, drawn once by the seed, one from each range of lengths: short and long ones alike.

    answer_tokens: of each prompt's answer, at least 2 of which are written. Raises DataError for no prompt, or one that
    the context does not hold with its answer.
    """
    if not prompts or len(prompts) != len(answer_tokens):
        raise DataError(
            f"{len(prompts)} prompts and {len(answer_tokens)} lengths of answers were given to time; give at least one "
            "prompt, and as many lengths"
        )
    lm = causal_lm(model)
    order = sorted(range(len(prompts)), key=lambda i: (answer_tokens[i], len(prompts[i])))
    ranges = [part for part in np.array_split(order, min(count, len(prompts))) if len(part)]
    drawn = np.random.default_rng(seed)
    room = context_length(lm) or 2**31
    chosen = []
    for part in ranges:
        index = int(drawn.choice(part))
        ids = encode_prompts(lm, tokenizer, [prompts[index]], 0)["input_ids"]
        chosen.append(TimedPrompt(ids, max(2, min(int(answer_tokens[index]), room - ids.shape[1]))))
    return chosen


@dataclass(frozen=True)
class _Parts:
    reading: float
    decision: float
    slicing: float
    steps: float
    kv: int
    keep: float
    bytes: int

    def total(self, charged: Sequence[str]) -> float:
        return sum(float(getattr(self, name)) for name in charged)


class _Requests:
    """Requests of one model."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.clock = lm, Clock(lm.device)

    def dense(self, prompt: TimedPrompt) -> _Parts:
        return self.answered(prompt, None, Dense())

    def answered(self, prompt: TimedPrompt, pruner: Pruner | None, execution: Execution) -> _Parts:
        """Read a prompt and write its answer; without a pruner dense."""
        mask = torch.ones_like(prompt.ids)
        sites = () if pruner is None else pruner.sites(self.lm)
        request = Request(mask, prompt.tokens, fill=pruner is not None and pruner.fill == "mean")
        signals = [] if pruner is None else pruner.signals
        with ExitStack() as stack:
            prepared = stack.enter_context(execution.prepared(request))
            out: list[Any] = []

            def read() -> None:
                window = None if pruner is None else pruner.window
                with measured(sites, signals, Prompt(mask.bool(), window)) as values:
                    out.append(self.lm(prompt.ids, use_cache=True, logits_to_keep=1, **prepared.cache_option))
                out.append(values)

            reading = self.clock(read)
            first, values = out
            count = partial(costs, self.lm, first.past_key_values, batch=1, context=prompt.ids.shape[1])
            size, kept, deciding, slicing = count().bytes, 1.0, 0.0, 0.0
            if pruner is not None:
                decision, deciding = self._decided(pruner, sites, values)
                kept, size = float(keep_ratio(decision.keep)), count(sites=sites, keep=decision.keep).bytes
                apply = execution.apply(sites, decision, first.past_key_values)
                slicing = self.clock(lambda: stack.enter_context(apply))
            kv = kv_bytes(first.past_key_values)
            greedy = prepared.greedy
            answer = partial(self._write, first, prompt.tokens)
            steps = self.clock(answer if greedy is None else partial(greedy, first.logits[:, -1]))
        return _Parts(reading, deciding, slicing, steps, kv, kept, size * (prompt.tokens - 1))

    def _decided(self, pruner: Pruner, sites: Sequence[Any], values: Any) -> tuple[Decision, float]:
        """A decision from what was measured, and the milliseconds that it took."""
        keep: list[Tensor] = []
        features = values.every_features(sites, pruner.policy.signals)

        def decide() -> None:
            keep.extend(pruner.keep(pruner.policy(features), [site.geometry for site in sites]))

        took = self.clock(decide)
        return Decision(keep, values.means(sites)), took

    def _write(self, out: Any, tokens: int) -> None:
        cache = out.past_key_values
        for _ in range(tokens - 1):
            out = self.lm(out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)


@torch.inference_mode()
def time_requests(
    model: Any,
    prompts: Sequence[TimedPrompt],
    pruner: Pruner | None,
    execution: str | Execution = "compact",
    *,
    num_runs: int = 5,
) -> TimedRun:
    """Requests of a pruner beside dense ones, in turns, prompt by prompt; without a pruner dense beside dense (A/A).

    Raises ConfigError for an execution that prunes nothing.
    """
    kind = kind_of(execution)
    if not kind.prunes:
        raise ConfigError(f"execution={kind.name!r} prunes nothing, so there is no time to compare; choose another")
    lm = causal_lm(model)
    execution, requests = execution_for(execution, lm), _Requests(lm)
    charged = ONCE if pruner is None or not pruner.signals else EACH
    pairs = []
    for prompt in prompts:
        other = partial(requests.dense, prompt)
        if pruner is not None:
            other = partial(requests.answered, prompt, pruner, execution)
        pairs.append(interleaved({"dense": partial(requests.dense, prompt), "pruned": other}, num_runs))

    def sums(variant: str, names: Sequence[str]) -> list[float]:
        return [sum(pair[variant][run].total(names) for pair in pairs) for run in range(num_runs)]

    last, tokens = [(pair["dense"][-1], pair["pruned"][-1]) for pair in pairs], [p.tokens for p in prompts]
    names = EACH if pruner is not None else ONCE
    return TimedRun(
        dense=sums("dense", ONCE),
        pruned=sums("pruned", charged),
        dense_steps=sums("dense", ["steps"]),
        steps=sums("pruned", ["steps"]),
        parts={name: float(np.median(sums("pruned", [name]))) / len(prompts) for name in names},
        charged=charged,
        prompts=len(prompts),
        tokens=sum(tokens),
        keep_ratio=float(np.average([one.keep for _, one in last], weights=tokens)),
        kv_bytes=float(np.average([one.kv for _, one in last], weights=tokens)),
        bytes=(sum(one.bytes for one, _ in last), sum(one.bytes for _, one in last)),
    )


def request_time(runs: Sequence[TimedRun]) -> RequestTime:
    """Whole requests of one policy, over all repetitions of its seeds."""
    dense, pruned = ([x for run in runs for x in getattr(run, name)] for name in ("dense", "pruned"))
    ratio, first = paired_ratio(dense, pruned), runs[0]
    return RequestTime(
        ms=summary(pruned).median / first.prompts,
        ratio_to_dense=ratio.median,
        ratio_ci95=ratio.ci95,
        parts={name: float(np.mean([run.parts[name] for run in runs])) for name in first.parts},
        charged=first.charged,
        prompts=first.prompts,
        tokens=first.tokens,
        n=len(pruned),
    )


def step_time(runs: Sequence[TimedRun]) -> Latency:
    """The decode steps of the same requests."""
    dense, pruned = ([x for run in runs for x in getattr(run, name)] for name in ("dense_steps", "steps"))
    ratio, steps = paired_ratio(dense, pruned), runs[0].tokens - runs[0].prompts
    best = ceiling(sum(run.bytes[0] for run in runs), sum(run.bytes[1] for run in runs))
    return Latency(
        keep_ratio=float(np.mean([run.keep_ratio for run in runs])),
        ms_per_token=summary(pruned).median / steps,
        ratio_to_dense=ratio.median,
        ratio_ci95=ratio.ci95,
        ceiling=best,
        realised_share=realised_share(ratio.median, best),
        kv_bytes=round(float(np.mean([run.kv_bytes for run in runs]))),
    )


def step_speed(
    model: Any,
    prompts: Sequence[TimedPrompt],
    pruner: Pruner,
    execution: str | Execution = "compact",
    *,
    num_runs: int = 5,
) -> Callable[[float], float]:
    """Dense time ÷ pruned time of decode steps at a keep ratio, on the prompts; each is measured once."""
    execution = execution_for(execution, causal_lm(model))  # once: what it captures serves every ratio

    @cache
    def speed(ratio: float) -> float:
        return step_time([time_requests(model, prompts, pruner.at(ratio), execution, num_runs=num_runs)]).ratio_to_dense

    return speed
