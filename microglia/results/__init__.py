"""What every verb returns: typed figures that say what kind of result they are, and their JSON.

    to_json()       a dict with "kind" and "version" first; null stands for NaN and infinity
    from_json(row)  the result again; the kind picks the class

A field that has its default value is left out of the JSON. A kind whose fields change gets the next version.
"""

from microglia.results.base import KINDS, Result, from_json, part_from_json, plain
from microglia.results.kinds import (
    AblationResult,
    BenchmarkResult,
    ComparisonResult,
    DemoResult,
    EvaluationResult,
    ExportResult,
    GenerationResult,
    JudgementResult,
    Promise,
    ReportResult,
    TrainingRun,
)
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
    Figures,
    FrozenAccuracy,
    Latency,
    RandomMasks,
    RequestTime,
    Summary,
    Tried,
)

__all__ = [
    "KINDS",
    "AblationResult",
    "AblationRow",
    "Adaptivity",
    "AnswerText",
    "AtBudget",
    "BenchmarkResult",
    "BenchmarkRow",
    "Circumstances",
    "ComparisonResult",
    "ComparisonRow",
    "Correlation",
    "DemoResult",
    "Difference",
    "EvaluationResult",
    "ExportResult",
    "Figure",
    "Figures",
    "FrozenAccuracy",
    "GenerationResult",
    "JudgementResult",
    "Latency",
    "Promise",
    "RandomMasks",
    "ReportResult",
    "RequestTime",
    "Result",
    "Summary",
    "TrainingRun",
    "Tried",
    "from_json",
    "part_from_json",
    "plain",
]
