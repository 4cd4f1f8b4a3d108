"""What results are made of."""

from dataclasses import dataclass, field
from typing import Any

Interval = tuple[float, float]
Shares = dict[str, float]  # of groups: difficulties, families, policies
Matrix = list[list[float]]  # site × head


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What measured figures depend on, as `record.circumstances` finds it."""

    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Difference:
    """A paired difference with its 95 % interval, and the p-value of none; p_holm is corrected for several tests."""

    diff: float
    ci95: Interval
    p_value: float
    p_holm: float | None = None


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with its 95 % interval."""

    rank_correlation: float
    ci95: Interval


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What one policy did on the prompts of a run, dense with sparsity 0.

    sparsity is a mean over prompts; sparsity_per_token one over the tokens of their answers, which time is spent on.
    heads: per site and head how often it was `kept`, and its mean signals; empty when dense.
    to_dense: accuracy minus that of the dense model on the same prompts. unfinished: share of answers that were cut off
    at the limit of new tokens; they are judged by what there is of them.
    """

    prompts: int
    accuracy: float
    accuracy_ci95: Interval
    sparsity: float
    accuracy_by_difficulty: Shares
    sparsity_by_difficulty: Shares
    accuracy_by_family: Shares
    sparsity_by_family: Shares
    mean_tokens: float
    seconds: float
    heads: dict[str, Matrix] = field(default_factory=dict)
    to_dense: Difference | None = None
    sparsity_per_token: float | None = None
    unfinished: float | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerText:
    """The answer to one prompt, and the share of units that were pruned for it."""

    prompt: str
    text: str
    sparsity: float


@dataclass(frozen=True, kw_only=True)
class Adaptivity:
    """What deciding by the input adds: accuracy of the agents minus that of the static baseline.

    target: the keep ratio of both, None where both keep what they were trained to; keep_ratios: what they kept, a mean
    over prompts; keep_ratios_per_token: the same over the tokens of their answers.
    """

    gain: float
    ci95: Interval
    p_value: float
    target: float | None
    keep_ratios: Shares
    loss: Difference | None = None
    keep_ratios_per_token: Shares = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Accuracy and loss of a policy over prompts and seeds, with 95 % intervals.

    keep_ratio is a mean over prompts; keep_ratio_per_token one over the tokens of their answers.
    """

    keep_ratio: float
    accuracy: float
    ci95: Interval
    loss: float
    loss_ci95: Interval
    keep_ratio_per_token: float | None = None


@dataclass(frozen=True)
class BenchmarkRow:
    """One variant at one batch size, context and keep ratio. Times are medians in ms, of a step of the whole batch.

    ratio_to_dense: median of paired dense time ÷ this time, with its 95 % interval; above 1 is faster.
    ceiling: the ratio's best possible value. kv_bytes: held after the prompt. peak_bytes: most memory of a request.
    bytes_per_token, step_flops: read and computed by one decode step. request_ratio: dense request ÷ this request.
    """

    variant: str
    batch_size: int
    context: int
    keep_ratio: float
    ms_per_token: float
    ratio_to_dense: float
    ceiling: float
    realised_share: float | None
    kv_bytes: int
    peak_bytes: int | None
    break_even_tokens: int | None
    p20: float
    p80: float
    n: int
    ratio_ci95: Interval
    sparsity: float
    decides: str
    weight_bytes: int
    bytes_per_token: int
    prefill_flops: int
    step_flops: int
    first_token_ms: float
    request_ms: float
    request_ratio: float
    new_tokens: int
    decision_ms: float | None = None
    slicing_ms: float | None = None
    monitoring_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class RandomMasks:
    """Means over random masks, and each of them."""

    accuracy: float
    sparsity: float
    masks: tuple[Summary, ...]


@dataclass(frozen=True, kw_only=True)
class AtBudget:
    """Agents and static baseline at one budget."""

    pruned: Summary
    static_baseline: Summary
    adaptivity: Adaptivity


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Decode steps on the prompts that were timed, whose own keep ratio stands here; ratios as in BenchmarkRow.

    In records of before: of the one prompt whose keep ratio was the policy's median.
    """

    keep_ratio: float
    ms_per_token: float
    ratio_to_dense: float
    ratio_ci95: Interval
    ceiling: float
    realised_share: float | None
    kv_bytes: int


@dataclass(frozen=True, kw_only=True)
class RequestTime:
    """Whole requests on a fixed set of prompts, each as long as its answer; times are medians of n repetitions, in ms.

    ms: per request as charged. ratio_to_dense: dense time ÷ this time over all the prompts, so that an answer counts by
    its tokens. parts: per request, also those that are not `charged`: a static mask is decided on and sliced once for
    all requests. prompts, tokens: of the set.
    """

    ms: float
    ratio_to_dense: float
    ratio_ci95: Interval
    parts: Shares
    charged: tuple[str, ...]
    prompts: int
    tokens: int
    n: int


@dataclass(frozen=True, kw_only=True)
class ComparisonRow(Figures):
    """One policy at one target keep ratio.

    to_dense: minus the dense model's accuracy; agents_to_this: the agents' accuracy at the same target minus this one.
    request: whole requests, in the dense row against dense ones once more (A/A); latency: decode steps alone.
    pareto: no other row is surely better in accuracy or in sparsity, or in time, and no worse in the other.
    """

    policy: str
    target: float
    mean_tokens: float
    prompts: int
    seeds: tuple[int, ...]
    request: RequestTime | None = None
    latency: Latency | None = None
    to_dense: Difference | None = None
    agents_to_this: Difference | None = None
    pareto_sparsity: bool
    pareto_latency: bool | None = None


@dataclass(frozen=True, kw_only=True)
class AblationRow(Figures):
    """One variant at the common keep ratio; `as_trained`: at the keep ratio that its training led to.

    to_base, loss_to_base: minus the base recipe's accuracy and loss.
    """

    variant: str
    changes: dict[str, Any]
    as_trained: Figures | None = None
    seconds: float
    agent_parameters: int
    to_base: Difference | None = None
    loss_to_base: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setting: the keep ratio that was the target, what was kept, and what that cost.

    lost, won: answers that were right dense only, and pruned only; None like accuracy where the loss counts no answers.
    drop: of accuracy, or the mean loss. drop_bound: its upper limit for this setting. keep_ratio is a mean over
    prompts; keep_ratio_per_token one over the tokens of their answers.
    """

    target: float
    threshold: float
    keep_ratio: float
    accuracy: float | None = None
    lost: int | None = None
    won: int | None = None
    drop: float
    drop_bound: float
    keep_ratio_per_token: float | None = None


@dataclass(frozen=True, kw_only=True)
class FrozenAccuracy:
    """The frozen model beside the dense one and the one that decides per prompt; frozen minus each of them."""

    dataset: str
    dense: Summary
    adaptive: Summary
    frozen: Summary
    paired: Difference
    paired_adaptive: Difference


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a data set, dense beside pruned; difference: pruned minus dense, paired by prompt.

    measure: `accuracy`; `unfinished`, the share of answers that were cut off; `kl`, nats per token to the dense model;
    `top1`, the share of tokens on which both agree; `perplexity` of the texts; `exact_prefix`, tokens of a greedy
    answer before the first that the dense model did not write (dense: all its tokens); `same`, answers that are the
    dense ones; `keep_ratio`. kl, top1 and perplexity are per token, over texts that both models are fed.
    prompts: how many it is over. dense is None where only the pruned model ran.
    """

    dataset: str
    measure: str
    prompts: int
    pruned: float
    dense: float | None = None
    difference: Difference | None = None
