"""A decode step of our own for CPUs: one compiled function that reads the model's arrays where they lie.

Under the library a step is hundreds of operations, each with its own passes over memory: a CPU takes two to four times
as long as its bytes need. Here it is one function, compiled by numba once for each machine; models, shapes and what is
left out are tables that it reads. Start with `step`.
"""

from microglia.execution.cpu.fast import Fast

__all__ = ["Fast"]
