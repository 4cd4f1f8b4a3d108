"""The cells, in order of importance, and how long each may take.

Times are for one H200 and a first call. The library's compiled step takes half a minute for every shape, so it is there
where a bar asks for it only; a level of ours takes 3 to 8 s. The first four kinds (decoding, heads and channels,
contextual, real weights) fit in 300 s together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.gpu.bench import Bench
from bench.gpu.decoding import Decoding
from bench.gpu.library import COMPILED, EAGER
from bench.gpu.options import Options
from bench.gpu.prompts import looking
from bench.gpu.training import training
from microglia.execution.captured.captured import ONE_ROW

# Contexts and batches of --tiny, as far from each other as the real ones are in kind.
TINY_SIZES = {512: 24, 4096: 40, 16: 3, 8: 2}
REAL = {"smollm2": 35.0, "qwen2.5-coder-0.5b": 40.0}  # name → seconds


@dataclass(frozen=True)
class Cell:
    """A part with a time of its own. cap: its most seconds. lacks: what is missing to measure it, if anything is."""

    name: str
    cap: float
    measure: Callable[[Bench], None]
    lacks: str = ""


def cells(options: Options) -> Iterator[Cell]:
    """All of them, with the names that `--only` and `--skip` take."""
    one, long = (1, 512), (16, 4096)
    yield _decoding(options, "phi3-mini", *one, cap=80, library=(EAGER, COMPILED), ways=options.ways, kernels=True)
    if not options.smoke:  # nothing in it that its neighbours do not show
        yield _decoding(options, "phi3-mini", 8, 512, cap=30, library=(EAGER,), ways=options.ways, own_rows=False)
    yield _decoding(options, "phi3-mini", *long, cap=75, library=(EAGER,), ways=options.ways, kernels=True)
    yield _decoding(options, "phi3-mini", *one, cap=40, units=("head", "channel"), ways=options.ways, kernels=True)
    yield Cell("contextual", 0.0, _nothing, "no execution here decides token by token on a GPU")
    for name, cap in (REAL | {name: 45.0 for name in sorted(options.weights.keys() - REAL.keys())}).items():
        if folder := options.weights.get(name):
            yield _decoding(options, name, *one, cap=cap, folder=folder, library=(EAGER, COMPILED), keep=(0.75,))
        elif not options.tiny:
            yield Cell(name, 0.0, _nothing, f"its weights are not here; give --weights {name}=FOLDER")
    yield Cell("phi3-mini prompts", 20.0, partial(looking, shape="phi3-mini"))
    if not options.smoke:
        yield _decoding(options, "llama3-8b", *one, cap=30, keep=(0.75,))
    yield _decoding(options, "qwen2.5-3b", *one, cap=30, keep=(0.75,))
    yield Cell("phi3-mini training", 25.0, partial(training, shape="phi3-mini"))


def _decoding(options: Options, shape: str, batch: int, context: int, *, cap: float, **what: Any) -> Cell:
    """Decode steps, by default in the first way alone."""
    what = {"ways": options.ways[:1], "keep": (0.75,) if options.smoke else (0.75, 0.5)} | what
    name = f"{shape} {batch}x{context}" + ("" if "units" not in what else " " + "+".join(what["units"]))
    what["ways"] = [way for way in what["ways"] if batch == 1 or not way.startswith(ONE_ROW)]
    if options.tiny:
        batch, context = TINY_SIZES.get(batch, batch), TINY_SIZES[context]
    return Cell(name, cap, Decoding(shape, batch, context, **what).measure)


def _nothing(bench: Bench) -> None:
    """What is measured where something is lacking."""
