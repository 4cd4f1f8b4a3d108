"""What a policy's decisions cost on a typical prompt: the one whose keep ratio is the median of all prompts'."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from microglia.benchmark.run import Plan, benchmark
from microglia.benchmark.subjects import Prompted, Subject
from microglia.gate import Gate, keep_ratio
from microglia.generation import encode_prompts, prompt_logits
from microglia.look import Look
from microglia.policy import Policy
from microglia.results import BenchmarkRow
from microglia.sites import causal_lm, find_sites

LOOKED_AT = 64  # prompts among which the typical one is found


def typical_subject(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    policy: Policy,
    gate_at: Callable[[float | None], Gate],
    *,
    look: Look | None = None,
) -> Subject:
    """The typical prompt at each keep ratio, whole unless it is longer than the context, the same in every row."""
    lm, prompts = causal_lm(model), prompts[:LOOKED_AT]
    geometries = [site.geometry for site in find_sites(lm)]
    logits = prompt_logits(lm, tokenizer, prompts, policy, look=look)

    def subject(batch: int, context: int, ratio: float | None) -> Prompted:
        gate = gate_at(ratio)
        kept = keep_ratio(gate.every(logits, geometries))
        middle = int(kept.argsort(stable=True)[(len(prompts) - 1) // 2])
        ids = encode_prompts(lm, tokenizer, [prompts[middle]], 0)["input_ids"][:, -context:]
        return Prompted(ids.expand(batch, -1).contiguous(), policy, gate, look or Look())

    return subject


@torch.inference_mode()
def typical_rows(
    lm: Any, subject: Subject, ratio: float | None, *, num_runs: int = 20, new_tokens: int = 64
) -> dict[str, BenchmarkRow]:
    """The measured row of every variant at one keep ratio, for one prompt."""
    room = getattr(causal_lm(lm).config, "max_position_embeddings", None) or 4096
    context = max(1, room - new_tokens - 8)
    plan = Plan(contexts=(context,), keep_ratios=(ratio,), new_tokens=new_tokens, num_runs=num_runs)
    return {row.variant: row for row in benchmark(lm, subject, plan, {}).rows}


def typical_speed(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    policy: Policy,
    gate_at: Callable[[float | None], Gate],
    *,
    look: Look | None = None,
    num_runs: int = 20,
) -> Callable[[float], float]:
    """Dense time ÷ compact time of a decode step at a keep ratio; each is measured once."""
    subject = typical_subject(model, tokenizer, prompts, policy, gate_at, look=look)

    @cache
    def speed(ratio: float) -> float:
        return typical_rows(model, subject, ratio, num_runs=num_runs)["compact"].ratio_to_dense

    return speed
