"""Decode steps of one model, batch and context: dense, and at each share of what is kept, beside the library's.

Every variant is measured and written as soon as it is captured, each in turn with the dense step of its own way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.bench import Bench
from bench.gpu.library import library_step
from bench.gpu.ours import Ours
from microglia.benchmark.ceiling import break_even_tokens, ceiling, realised_share
from microglia.benchmark.latency import Ratio, interleaved, paired_ratio, summary
from microglia.errors import ConfigError
from microglia.units import find_sites

# How far logits may lie from those of masked execution, as a share of their norm.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Decoding:
    """What is measured at one place.

    ways: of captured steps, each at every level. keep: shares of the units besides everything. units: kinds that are
    pruned; with others than heads a share is one of all bytes. own_rows: whether rows also decide each for itself.
    library: variants of the library. folder: of the model, if it is not a shape. kernels: whether to list what takes a
    step's time.
    """

    shape: str
    batch: int
    context: int
    ways: Sequence[str]
    keep: Sequence[float] = (0.75, 0.5)
    units: Sequence[str] = ("head",)
    own_rows: bool = True
    library: Sequence[str] = ()
    folder: Path | None = None
    kernels: bool = False

    def measure(self, bench: Bench) -> None:
        """All of it: ours in the first way, the library's, and then the other ways, as far as time goes."""
        lm = bench.model(self.shape, self.folder)
        ids = bench.tokens(lm, self.batch, self.context)
        first, *others = self.ways
        self.in_way(bench, lm, ids, first)
        for name in self.library:
            if not bench.known("gpu_decode", **self.key(lm, name)):
                with bench.attempt(f"{self.place}, {name}"):
                    self.of_library(bench, lm, ids, name)
        for way in others:
            self.in_way(bench, lm, ids, way)

    def in_way(self, bench: Bench, lm: Any, ids: Tensor, way: str) -> None:
        """What is not known yet of one way."""
        missing = [name for name in self.variants() if not bench.known("gpu_decode", **self.key(lm, name, way))]
        if missing:
            with bench.attempt(f"{self.place}, {way}"):
                self.ours(bench, lm, ids, way, missing)

    @property
    def place(self) -> str:
        return f"{self.shape} {self.batch} × {self.context}"

    def key(self, lm: Any, variant: str, way: str = "") -> dict[str, Any]:
        """What tells one measured step from the others."""
        at = {"shape": self.shape, "layers": len(find_sites(lm)), "batch": self.batch, "context": self.context}
        return at | {"variant": variant, "way": way}

    def variants(self) -> dict[str, float]:
        """Name of a captured variant → share that it keeps. `compact` rows share a decision, `rows` have their own."""
        if self.units != ("head",):
            return {"dense": 1.0} | {f"{'+'.join(self.units)} {ratio}": ratio for ratio in self.keep}
        kinds = ("compact", "rows") if self.own_rows and self.batch > 1 else ("compact",)
        return {"dense": 1.0} | {f"{kind} {ratio}": ratio for ratio in self.keep for kind in kinds}

    @torch.inference_mode()
    def ours(self, bench: Bench, lm: Any, ids: Tensor, way: str, missing: Sequence[str]) -> None:
        """The captured variants of one way that are missing."""
        try:
            ours = Ours(lm, ids, way, self.units, bench.options.steps)
        except ConfigError as error:
            bench.failed(f"{self.place}, {' and '.join(self.units)}: not supported, {error}")
            return
        work: dict[str, Callable[[], tuple[float, float]]] = {"dense": partial(ours.burst, None)}
        for name in self.variants():
            if name in missing:
                with bench.attempt(f"{self.place}, {way}, {name}"):
                    self.variant(bench, lm, ours, way, name, work)
        for name in list(work)[:2] if self.kernels else []:
            with bench.attempt(f"{self.place}, {way}, kernels of {name}"):
                kernels(bench, self.key(lm, name, way), work[name])

    def variant(self, bench: Bench, lm: Any, ours: Ours, way: str, name: str, work: dict[str, Any]) -> None:
        """Capture one variant, measure it in turn with the dense step, and write it. What works joins `work`."""
        own = name.startswith("rows")
        ratio = self.variants()[name]
        keep = None if name == "dense" else ours.keep(ratio, rows=self.batch if own else 1)
        first = ours.capture(keep) + (ours.first_s if name == "dense" else 0.0)
        for passed_over, why in ours.step.failed.items():
            bench.say_once(
                f"{self.place}, {way}: attention by {passed_over} was passed over, {why.splitlines()[0]:.200}"
            )
        apart = ours.apart(keep) if self.batch == 1 or bench.options.smoke or bench.options.tiny else None
        if apart is not None and not apart <= TOLERANCE[lm.dtype]:  # NaN is not
            bench.failed(f"{self.place}, {way}, {name}: wrong, logits lie {apart:.2g} from those of masked execution")
        captures, burst = ours.execution.captures, partial(ours.burst, keep)
        samples = interleaved({"dense": work["dense"], name: burst}, bench.options.rounds)
        if ours.execution.captures != captures:
            raise RuntimeError(f"a switch captured again: {captures} captures became {ours.execution.captures}")
        dense, steps = ([ms for ms, _ in samples[variant]] for variant in ("dense", name))
        work[name] = burst
        speed = paired_ratio(dense, steps) if keep else Ratio(1.0, (1.0, 1.0))
        read, whole = ours.bytes(keep, shared=not own), ours.bytes(None)
        switch = summary([ms for _, ms in samples[name]]).median if keep else None
        tried = ours.tried()
        extra = self.figures(speed, summary(dense).median, summary(steps).median, switch, ceiling(whole, read))
        self.write(
            bench,
            self.key(lm, name, way),
            steps,
            bytes=read,
            byte_share=read / whole,
            first_s=first,
            apart=apart,
            ways_ms=tried,
            **extra,
        )

    def figures(self, speed: Ratio, dense: float, ms: float, switch: float | None, best: float) -> dict[str, Any]:
        """What a variant gains over its own way's dense step, and what it could gain at most."""
        return {
            "ratio_to_dense": speed.median,
            "ratio_ci95": speed.ci95,
            "ceiling": best,
            "realised_share": realised_share(speed.median, best),
            "switch_ms": switch,
            "break_even_tokens": None if switch is None else break_even_tokens(switch, dense, ms),
        }

    def of_library(self, bench: Bench, lm: Any, ids: Tensor, name: str) -> None:
        """A variant of the library."""
        steps, rounds = bench.options.steps, max(1, bench.options.rounds // 2)
        time, first = library_step(lm, ids, name, steps=steps, rounds=rounds)
        key = self.key(lm, name)
        bench.write("gpu_decode", time.median, "ms", key, p20=time.p20, p80=time.p80, n=time.n, first_s=first)
        print(f"  {name:<18} {time.median:8.3f} ms", flush=True)

    def write(self, bench: Bench, key: dict[str, Any], samples: Sequence[float], **extra: Any) -> None:
        """One record of a captured step, and a line of it."""
        time, gbs = summary(samples), bench.bandwidth()
        drawn = self.folder is None or not any(self.folder.glob("*.safetensors"))
        roof = extra["bytes"] / gbs / 1e6
        bench.write(
            "gpu_decode", time.median, "ms", key, p20=time.p20, p80=time.p80, n=time.n, roof_ms=roof,
            bandwidth_gbs=gbs, random_weights=drawn, **extra,
        )  # fmt: skip
        tried = ", ".join(f"{way} {ms:.3f}" for way, ms in extra["ways_ms"].items())
        print(f"  {key['variant']:<18} {time.median:8.3f} ms   {key['way']}   {tried}", flush=True)


def kernels(bench: Bench, key: dict[str, Any], burst: Callable[[], Any]) -> None:
    """Where a step's time goes: the kernels that take most of it, for whoever wants to close the gap."""
    if bench.known("gpu_kernels", **key):
        return
    kind = "CUDA" if bench.device.type == "cuda" else "CPU"
    with torch.profiler.profile(
        activities=[getattr(torch.profiler.ProfilerActivity, kind)], acc_events=True
    ) as profile:
        burst()
    spent = "self_device_time_total" if kind == "CUDA" else "self_cpu_time_total"
    spent_in = [(e.key, e.count, getattr(e, spent) / 1e3) for e in profile.key_averages()]
    spent_in = sorted((f for f in spent_in if f[2] > 0), key=lambda f: -f[2])
    steps, total = bench.options.steps + 1, sum(ms for _, _, ms in spent_in)
    top = [(name[:60], count / steps, ms / steps) for name, count, ms in spent_in[:10]]
    bench.write("gpu_kernels", total / steps, "ms", key, top=top)
    print(f"  {key['variant']}: {total / steps:.3f} ms in kernels, of which", flush=True)
    print("\n".join(f"  {ms:>8.3f} ms in {count:>6.1f} of {name}" for name, count, ms in top), flush=True)
