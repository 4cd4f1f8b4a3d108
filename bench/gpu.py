"""The benchmark of a GPU: decode steps of the library and of ours, prompts and a training step, against the bars.

    python bench/gpu.py --smoke                                  # a minute with two layers of everything: does it run?
    python bench/gpu.py --budget 420 --output results/gpu.jsonl  # all of it, in order of importance
    python bench/gpu.py --budget 300 --resume results/gpu.jsonl  # goes on where that ended
    python bench/gpu.py --tiny                                   # the same programme in seconds, on any machine

It needs a checkout, torch and transformers; nothing has to be installed or downloaded. Random weights serve where only
shapes count. Each number is written when it is measured, a cell that fails or takes too long costs its own time only,
and the table of all that is there comes last, also when the programme is told to end. What was compiled is kept in
.cache, for the next call on the same machine.
"""

import os
import sys
import time
from pathlib import Path

BEGAN = time.monotonic()  # the budget counts from here: importing torch takes seconds
ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # a checkout need not be installed
    # Before torch is imported, which reads them then.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")

    from bench.gpu.options import options
    from bench.gpu.programme import run

    sys.exit(run(options(__doc__), began=BEGAN))
