"""One class for every kind of result."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from microglia.results.base import Result
from microglia.results.parts import (
    AblationRow,
    Adaptivity,
    AnswerText,
    AtBudget,
    BenchmarkRow,
    Circumstances,
    ComparisonRow,
    Correlation,
    Difference,
    Figure,
    FrozenAccuracy,
    Latency,
    RandomMasks,
    RequestTime,
    Shares,
    Summary,
    Tried,
)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(Result):
    """Accuracy and sparsity of a pruned model; `dense` and `paired` where the dense model answered too.

    answers: one row per example for each model; `microglia evaluate` writes them to a file of their own.
    figures: how close the answers are to the dense ones, beside the accuracy. max_new_tokens: where answers are cut.
    """

    kind: ClassVar[str] = "evaluation"

    dataset: str
    split: str
    shots: int
    scoring: str
    accuracy: float
    sparsity: float
    pruned: Summary
    dense: Summary | None = None
    paired: Difference | None = None
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    max_new_tokens: int | None = None
    circumstances: Circumstances = field(default_factory=Circumstances)


@dataclass(frozen=True, kw_only=True)
class JudgementResult(Result):
    """Several data sets at once, or texts on which nothing is right or wrong: their figures, dense beside pruned.

    evaluations: by data set, the details of those that have right answers. settings: what else the figures depend on.
    """

    kind: ClassVar[str] = "judgement"

    figures: tuple[Figure, ...]
    evaluations: dict[str, EvaluationResult] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    circumstances: Circumstances = field(default_factory=Circumstances)


@dataclass(frozen=True, kw_only=True)
class DemoResult(Result):
    """The demo: dense, agents (`pruned`), static baseline and random masks on the same problems.

    low_budget: agents and static baseline once more with fewer heads. requests, steps: whole requests on a fixed set of
    prompts and their decode steps alone, by policy, dense against dense (A/A) among them; latency: in records of
    before, a decode step of one prompt.
    """

    kind: ClassVar[str] = "demo"

    dense: Summary
    pruned: Summary
    static_baseline: Summary
    random: RandomMasks
    adaptivity: Adaptivity
    low_budget: AtBudget
    follows_difficulty: Correlation | None
    agent_parameters: int
    agent_share: float
    seconds: float
    problems: int
    seed: int
    circumstances: Circumstances
    requests: dict[str, RequestTime] = field(default_factory=dict)
    steps: dict[str, Latency] = field(default_factory=dict)
    latency: tuple[BenchmarkRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ComparisonResult(Result):
    """Policies over keep ratios and seeds, the dense model first.

    by_keep_ratio: adaptivity at every target; settings: what else the answers depend on; effort: what making each
    policy took, its training or its calibration examples.
    """

    kind: ClassVar[str] = "comparison"

    rows: tuple[ComparisonRow, ...]
    adaptivity: Adaptivity
    by_keep_ratio: tuple[Adaptivity, ...]
    follows_difficulty: Correlation | None
    sparsity_by_difficulty: Shares
    sparsity_by_family: Shares
    dataset: str = ""
    split: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    effort: dict[str, Any] = field(default_factory=dict)
    circumstances: Circumstances = field(default_factory=Circumstances)


@dataclass(frozen=True, kw_only=True)
class AblationResult(Result):
    """Variants of a recipe, the base first."""

    kind: ClassVar[str] = "ablation"

    rows: tuple[AblationRow, ...]
    base: dict[str, Any]
    at_keep_ratio: float
    seeds: tuple[int, ...]
    prompts: int
    dataset: str = ""
    split: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    circumstances: Circumstances = field(default_factory=Circumstances)


@dataclass(frozen=True, kw_only=True)
class Promise(Result):
    """The setting that was chosen, and all that were tried, gentlest first.

    keep_ratio: mean over the prompts; 1 for the dense model, when nothing could be promised. max_drop: the promise;
    None when a keep ratio or a speed was the aim. drop_bound: at most max_drop, and for a setting that was an aim a
    limit at the same confidence; for a chosen one it makes no allowance for the choice, which max_drop does.
    keep_ratio_per_token: the same over the tokens of their answers.
    needed: prompts without which nothing can be promised, when they were too few. loss: what a drop is of, accuracy,
    agreement (tokens) or kl (nats per token). sentence: all that, for people.
    """

    kind: ClassVar[str] = "promise"

    keep_ratio: float
    threshold: float
    drop: float
    drop_bound: float
    confidence: float
    prompts: int
    max_drop: float | None
    dense_accuracy: float | None
    accuracy: float | None
    tried: tuple[Tried, ...] = ()
    needed: int | None = None
    loss: str = "accuracy"
    keep_ratio_per_token: float | None = None
    sentence: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Result):
    """Rows of a benchmark; `subject` says what was measured."""

    kind: ClassVar[str] = "benchmark"

    rows: tuple[BenchmarkRow, ...]
    subject: dict[str, Any]
    circumstances: Circumstances = field(default_factory=Circumstances)


@dataclass(frozen=True, kw_only=True)
class TrainingRun(Result):
    """What a training made; `training` holds its options and last figures."""

    kind: ClassVar[str] = "training"

    output_dir: str
    base_model: str | None
    dataset: str
    seconds: float
    agent_parameters: int
    agent_share: float
    training: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GenerationResult(Result):
    """Answers to questions; sparsity is their mean."""

    kind: ClassVar[str] = "generation"

    answers: tuple[AnswerText, ...]
    sparsity: float


@dataclass(frozen=True, kw_only=True)
class ReportResult(Result):
    """A written page."""

    kind: ClassVar[str] = "report"

    output: str
    bytes: int
    sections: tuple[str, ...]
    runs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ExportResult(Result):
    """A written export. Sizes are parameters and bytes of weights; `heads` are the kept ones of every site.

    difference: the largest one found by reading the export back (logits; tensors for gguf), None when not compared.
    """

    kind: ClassVar[str] = "export"

    microglia: str
    format: str
    folder: str
    files: tuple[str, ...]
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    difference: float | None
    lost: tuple[str, ...]
    plan: str
    prompts: int
    threshold: float
    keep_ratio: float
    sparsity: float
    adaptive_keep_ratio: float
    heads: list[list[int]]
    base_model: str | None = None
    template: str = ""
    accuracy: FrozenAccuracy | None = None
