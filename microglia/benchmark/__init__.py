"""Time, memory and operations of a model dense, masked and compacted, each beside the best that its keep allows."""

from microglia.benchmark.ceiling import break_even_tokens, ceiling, realised_share
from microglia.benchmark.requests import (
    TimedPrompt,
    TimedRun,
    fixed_prompts,
    request_time,
    step_speed,
    step_time,
    time_requests,
)
from microglia.benchmark.rows import records
from microglia.benchmark.run import Plan, benchmark
from microglia.benchmark.shapes import SHAPES, random_model
from microglia.benchmark.subjects import RANDOM_UNITS, Prompted, random_subject, text_subject

__all__ = [
    "RANDOM_UNITS",
    "SHAPES",
    "Plan",
    "Prompted",
    "TimedPrompt",
    "TimedRun",
    "benchmark",
    "break_even_tokens",
    "ceiling",
    "fixed_prompts",
    "random_model",
    "random_subject",
    "realised_share",
    "records",
    "request_time",
    "step_speed",
    "step_time",
    "text_subject",
    "time_requests",
]
