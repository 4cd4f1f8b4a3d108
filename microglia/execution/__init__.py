"""Ways to carry out a decision: dense, masked, compact (really gone), captured (gone, and steps replayed)."""

from microglia.execution.base import EXECUTIONS, Decision, Execution, Prepared, Request, execution_for, kind_of
from microglia.execution.captured import Captured
from microglia.execution.compact import Compact
from microglia.execution.dense import Dense
from microglia.execution.masked import Masked

__all__ = [
    "EXECUTIONS",
    "Captured",
    "Compact",
    "Decision",
    "Dense",
    "Execution",
    "Masked",
    "Prepared",
    "Request",
    "execution_for",
    "kind_of",
]
