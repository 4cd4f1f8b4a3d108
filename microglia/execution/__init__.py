"""Ways to carry out a decision: dense, masked, compact (really gone), captured (gone, and steps replayed), fast
(gone, and steps of our own on a CPU).
"""

from microglia.execution.base import EXECUTIONS, Decision, Execution, Prepared, Request, execution_for, kind_of
from microglia.execution.captured import Captured
from microglia.execution.compact import Compact
from microglia.execution.cpu import Fast
from microglia.execution.dense import Dense
from microglia.execution.masked import Masked

__all__ = [
    "EXECUTIONS",
    "Captured",
    "Compact",
    "Decision",
    "Dense",
    "Execution",
    "Fast",
    "Masked",
    "Prepared",
    "Request",
    "execution_for",
    "kind_of",
]
