"""Time, memory and operations of a model dense, masked and compacted, each beside the best that its keep allows."""

from microglia.benchmark.ceiling import break_even_tokens, ceiling, realised_share
from microglia.benchmark.rows import records
from microglia.benchmark.run import Plan, benchmark
from microglia.benchmark.shapes import SHAPES, random_model
from microglia.benchmark.subjects import Prompted, random_subject, text_subject
from microglia.benchmark.typical import typical_rows, typical_speed, typical_subject

__all__ = [
    "SHAPES",
    "Plan",
    "Prompted",
    "benchmark",
    "break_even_tokens",
    "ceiling",
    "random_model",
    "random_subject",
    "realised_share",
    "records",
    "text_subject",
    "typical_rows",
    "typical_speed",
    "typical_subject",
]
