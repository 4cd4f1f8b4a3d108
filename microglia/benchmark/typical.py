"""What a pruner's decisions cost on a typical prompt: the one whose keep ratio is the median of all prompts'."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from microglia.anatomy import causal_lm, context_length
from microglia.benchmark.run import Plan, benchmark
from microglia.benchmark.subjects import Prompted, Subject
from microglia.errors import ConfigError
from microglia.execution import Execution, execution_for, kind_of
from microglia.gate import keep_ratio
from microglia.pruner import Pruner
from microglia.reading import encode_prompts, read_prompts
from microglia.results import BenchmarkRow

SAMPLE = 64  # prompts among which the typical one is found


def typical_subject(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], pruner: Pruner) -> Subject:
    """The typical prompt at each keep ratio, whole unless it is longer than the context, the same in every row."""
    lm, prompts = causal_lm(model), prompts[:SAMPLE]
    geometries = [site.geometry for site in pruner.sites(lm)]
    logits = read_prompts(lm, tokenizer, prompts, pruner).logits

    def subject(batch: int, context: int, ratio: float | None) -> Prompted:
        budgeted = pruner.at(ratio)
        kept = keep_ratio(budgeted.keep(logits, geometries))
        middle = int(kept.argsort(stable=True)[(len(prompts) - 1) // 2])
        ids = encode_prompts(lm, tokenizer, [prompts[middle]], 0)["input_ids"][:, -context:]
        return Prompted(ids.expand(batch, -1).contiguous(), budgeted)

    return subject


def typical_rows(
    model: Any,
    subject: Subject,
    ratio: float | None,
    execution: str | Execution = "compact",
    *,
    num_runs: int = 20,
    new_tokens: int = 64,
) -> dict[str, BenchmarkRow]:
    """Rows of one execution beside dense at one keep ratio, for one prompt: `dense`, `pruned` and `pruned_total`.

    `pruned_total` has decision and slicing in it, where the execution saves anything.
    """
    kind = kind_of(execution)
    if not kind.prunes:
        raise ConfigError(f"execution={kind.name!r} prunes nothing, so there is no time to compare; choose another")
    context = max(1, (context_length(model) or 4096) - new_tokens - 8)
    plan = Plan(
        contexts=(context,),
        keep_ratios=(ratio,),
        new_tokens=new_tokens,
        num_runs=num_runs,
        executions=("dense", execution),
    )
    rows = {row.variant: row for row in benchmark(model, subject, plan, {}).rows}
    return {name.replace(kind.name, "pruned", 1): row for name, row in rows.items()}


def typical_speed(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    pruner: Pruner,
    execution: str | Execution = "compact",
    *,
    num_runs: int = 20,
) -> Callable[[float], float]:
    """Dense time ÷ pruned time of a decode step at a keep ratio; each is measured once."""
    subject = typical_subject(model, tokenizer, prompts, pruner)
    execution = execution_for(execution, causal_lm(model))  # once: what it captures serves every ratio

    @cache
    def speed(ratio: float) -> float:
        return typical_rows(model, subject, ratio, execution, num_runs=num_runs)["pruned"].ratio_to_dense

    return speed
