"""Decoding on a GPU: Hugging Face as it is and compiled, and ours dense, masked and compact, beside their ceilings.

    python bench/gpu.py --output results/gpu.jsonl

One command for one GPU. It ends by itself: a cell (model, batch, context) is begun only if the time left should be
enough, a second call with the same --output goes on where the first one stopped, and a short table comes last. Most of
a cell's time is compilation (Hugging Face's step anew for every shape), so all cells take several calls; `--shapes`,
`--cells` and `--only` choose. What fails (memory, a compiler) is said and costs its own part only. Random weights: what
is measured depends on shapes, and nothing has to be downloaded. `--tiny` runs all of it in seconds on any machine, to
see that it works.

Of ours, every way named by `--ours` is measured dense in every cell, and the fastest goes on with the pruned variants.
A way is `compile:attention:block`, see `microglia.execution.Captured`; compile is none or a mode of torch.compile.
"""

import argparse
import gc
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from microglia.anatomy import Anatomy
from microglia.attach import attached
from microglia.benchmark.ceiling import break_even_tokens, ceiling, realised_share
from microglia.benchmark.costs import weight_bytes
from microglia.benchmark.latency import Clock, interleaved, paired_ratio, summary
from microglia.benchmark.memory import peak_bytes, reset_peak
from microglia.benchmark.pattern import random_keep
from microglia.benchmark.shapes import random_model
from microglia.execution import Captured, Decision, Request
from microglia.execution.captured import CapturedStep
from microglia.gate import Gate
from microglia.policies import AgentPolicy
from microglia.pruner import Pruner
from microglia.record import Record, append_records, circumstances, read_records
from microglia.signals import Queries
from microglia.signals.entropy import by_logits, entropies, partial_entropy
from microglia.units import find_sites

GIB = 2**30
# What is asked for most comes first: the bars are at 1 × 512 and 16 × 4,096.
CELLS = "1x512,16x4096,8x512,1x4096,8x4096,16x512"
OURS = "default:stock:4,default:products:4,default:products:64"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="phi3-mini,qwen2.5-3b,llama3-8b")
    parser.add_argument("--layers", type=int, help="only so many layers of each")
    parser.add_argument("--cells", default=CELLS, help="batch x context, in the order of measuring")
    parser.add_argument("--keep", default="0.75,0.5", help="keep ratios besides 1.0, which is the dense variant")
    parser.add_argument("--ours", default=OURS, help="ways of ours to choose from, compile:attention:block")
    parser.add_argument("--steps", type=int, default=32, help="decode steps in one measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant, taking turns")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin nothing after that; the whole ends soon after"
    )
    parser.add_argument("--hf-eager", action="store_true", help="do not let Hugging Face compile its step")
    parser.add_argument("--only", default="decode,prefill,training", help="parts to measure")
    parser.add_argument("--output", type=Path, help="file of records to append to, and to go on from")
    parser.add_argument("--tiny", action="store_true", help="the whole programme on the reasoner, in seconds")
    options = parser.parse_args()
    if options.tiny:
        options.shapes, options.layers, options.cells, options.hf_eager = "reasoner", 2, "1x24,2x24", True
        options.steps, options.rounds, options.ours = 2, 1, "none:stock:1,none:products:1"
    return options


@dataclass
class Run:
    """What all parts share: options, device, what was measured, and how long there is."""

    options: argparse.Namespace
    device: torch.device
    began: float = field(default_factory=time.monotonic)
    until: float = 0.0  # minutes
    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    done: set[tuple[Any, ...]] = field(default_factory=set)
    longest: float = 0.0  # seconds of a cell so far

    def left(self) -> float:
        """Seconds in which something may still begin."""
        return self.until * 60 - (time.monotonic() - self.began)

    def known(self, name: str, **key: Any) -> bool:
        """Whether the file of records has this already."""
        return (name, *sorted(key.items())) in self.done

    def write(self, name: str, value: float, unit: str, key: dict[str, Any], **extra: Any) -> None:
        """Append one record."""
        if self.options.output is not None:
            spread = {name: extra.pop(name, None) for name in ("p20", "p80")} | {"n": extra.pop("n", 1)}
            circumstance = circumstances(self.device)
            record = Record(name, value, unit, **spread, seed=0, extra={**key, **extra, "key": key}, **circumstance)
            append_records(self.options.output, [record])

    def say(self, line: str) -> None:
        """A line now, and again at the end."""
        print(line, flush=True)
        self.lines.append(line)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A part that may fail without taking the others with it; only the end of time goes through."""
        try:
            yield
        except TimeoutError:
            raise
        except Exception as error:
            reason = (
                "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
            )
            traceback.print_exc()
            self.say(f"{what}: not measured, {reason.splitlines()[0][:200]}")
        self.tidy()

    def tidy(self) -> None:
        """Give back memory that nobody uses: what an error held on to, and captured steps of the cell before."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Stamps(StoppingCriteria):
    """Stops nothing; notes when each step of a `generate` is over, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, list[Any]()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        if self.device.type == "cuda":
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step_ms(self) -> float:
        """Median time of a decode step. The first mark stands after the prefill.

        The median, because a new static cache makes the library's compiled step capture its graphs again.
        """
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            self.marks[-1].synchronize()
            return statistics.median(float(first.elapsed_time(second)) for first, second in pairs)
        return statistics.median((second - first) * 1e3 for first, second in pairs)


def bandwidth(device: torch.device) -> float:
    """GB/s at which the device reads: the best of ten sums over a tensor that no cache holds."""
    size = 4 * GIB if device.type == "cuda" else 2**24
    x, clock = torch.ones(size // 4, device=device), Clock(device)
    best = min(clock(lambda: x.sum()) for _ in range(11))
    return size / best / 1e6


def tokens(lm: Any, batch: int, length: int) -> Tensor:
    """Random prompts (batch, length) on the model's device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(Anatomy(lm).vocab_size, (batch, length), generator=generator).to(lm.device)


# --- decoding ---------------------------------------------------------------------------------------------------------


class Cell:
    """One model, one batch size, one context."""

    def __init__(self, run: Run, lm: Any, batch: int, context: int) -> None:
        self.run, self.lm, self.batch, self.context = run, lm, batch, context
        self.steps, self.clock = run.options.steps, Clock(run.device)
        with torch.inference_mode(False):  # the library's own generate runs without it
            self.ids = tokens(lm, batch, context)
            self.mask = torch.ones_like(self.ids)
        self.sites = find_sites(lm)
        self.geometries = [layer.heads for layer in Anatomy(lm).layers]
        self.peaks: dict[str, float] = {}
        self.costs: dict[str, float] = {}
        self.ways: dict[str, float] = {}
        # The library remembers the longest static cache of a model and makes every later one as long.
        for memory in ("_previous_max_cache_length", "_cache"):
            vars(lm).pop(memory, None)

    @contextmanager
    def peak(self, name: str) -> Iterator[None]:
        """Note the most memory held inside, without what was held by others before, with the weights."""
        held = torch.cuda.memory_allocated() if self.run.device.type == "cuda" else 0
        weights = sum(p.numel() * p.element_size() for p in self.lm.parameters())
        reset_peak(self.run.device)
        yield
        most = peak_bytes(self.run.device)
        if most is not None:
            self.peaks[name] = (most - max(0, held - weights)) / GIB

    @contextmanager
    def cost(self, name: str) -> Iterator[None]:
        """Note the seconds spent inside."""
        began = time.monotonic()
        yield
        self.costs[name] = time.monotonic() - began

    @torch.inference_mode(False)
    def hf(self, **options: Any) -> float:
        """Milliseconds of a decode step inside the library's own `generate`."""
        stamps = Stamps(self.run.device)
        self.lm.generate(
            self.ids, attention_mask=self.mask, max_new_tokens=self.steps + 1, do_sample=False, eos_token_id=None,
            pad_token_id=0, stopping_criteria=[stamps], **options,
        )  # fmt: skip
        return stamps.step_ms()

    def variants(self) -> tuple[dict[str, Callable[[], Any]], Captured]:
        """Every variant, warm: compiled, captured, its memory noted. One of the library's that fails is left out."""
        static = {"cache_implementation": "static", "disable_compile": self.run.options.hf_eager}
        library = {"hf": self.hf, "hf static compiled": lambda: self.hf(**static)}
        work: dict[str, Callable[[], Any]] = {}
        for name, variant in library.items():
            with self.run.attempt(f"{name}, batch {self.batch}, context {self.context}"), self.peak(name):
                with self.cost(f"{name} first"):
                    variant()
                variant()
                work[name] = variant
        way = self.fastest()
        with self.peak("ours"):
            execution, step = self.captured(way)
            work |= self.ours(step)
            for name, variant in work.items():
                if name not in library:
                    with self.cost(f"capture {name}"):
                        variant()
        return work, execution

    def captured(self, way: str) -> tuple[Captured, CapturedStep]:
        """An execution of a way with the dense step captured and the prompt in its cache."""
        compiled, attention, block = way.split(":")
        execution = Captured(self.lm, compiled=compiled != "none" and compiled, attention=attention, block=int(block))
        with self.cost(f"capture {way}"):
            execution.step_for(self.batch, self.context + self.steps + 2)
        with execution.serving(Request(self.mask, self.steps + 2)) as step:
            self.lm(self.ids, past_key_values=step.cache, logits_to_keep=1)
        return execution, step

    def dense_ms(self, way: str) -> float:
        """Milliseconds of a dense step, made this way; what it captured goes again."""
        _, step = self.captured(way)
        return min(self.burst(step, None)[0] for _ in range(3))

    def fastest(self) -> str:
        """The way with the fastest dense step."""
        ways = self.run.options.ours.split(",")
        for way in ways if len(ways) > 1 else []:
            with self.run.attempt(f"ours {way}, batch {self.batch}, context {self.context}"):
                self.ways[way] = self.dense_ms(way)
                key = {"batch": self.batch, "context": self.context, "way": way}
                self.run.write("gpu_way", self.ways[way], "ms", key, layers=len(self.sites), n=3)
        if self.ways:
            print("  ".join(f"{way} {ms:.3f} ms" for way, ms in self.ways.items()), flush=True)
        return min(self.ways, key=self.ways.__getitem__, default=ways[0])

    def ours(self, step: CapturedStep) -> dict[str, Callable[[], Any]]:
        """Captured steps: dense, and masked and compact at every keep ratio."""
        work: dict[str, Callable[[], Any]] = {"dense": partial(self.burst, step, None)}
        for ratio in self.ratios():
            shared = [k.to(self.run.device) for k in random_keep(self.geometries, ratio)]
            rows = [k.to(self.run.device) for k in random_keep(self.geometries, ratio, rows=self.batch)]
            work[f"masked {ratio}"] = partial(self.burst, step, shared, masked=True)
            work[f"compact {ratio}"] = partial(self.burst, step, shared)
            if self.batch > 1:
                work[f"rows {ratio}"] = partial(self.burst, step, rows)
        return work

    def burst(self, step: CapturedStep, keep: Sequence[Tensor] | None, *, masked: bool = False) -> tuple[float, float]:
        """Milliseconds of a step, and of the switch before it.

        The same prompt is switched again and again, so its keys end up in wrong places: the times do not know.
        """
        every = [torch.ones(1, geometry.count, device=self.run.device) for geometry in self.geometries]
        step.clear()
        step.prompt_read(self.mask)
        decision = Decision(every if keep is None else keep)
        switch = self.clock(lambda: step.decide(decision, masked=masked))

        def steps() -> None:
            for _ in range(self.steps):
                step.step()

        step.step()
        return self.clock(steps) / self.steps, switch

    def ratios(self) -> list[float]:
        return [float(x) for x in self.run.options.keep.split(",") if float(x) < 1]

    def bytes(self, keep: Sequence[Tensor] | None, *, shared: bool = True) -> int:
        """What a step reads: weights, and keys and values of the tokens that are there."""
        token = 2 * self.batch * self.context * self.lm.dtype.itemsize
        shares = [1.0 if keep is None else site.kv_share(keep[site.index]) for site in self.sites]
        kv = sum(round(token * g.kv_width * share) for g, share in zip(self.geometries, shares, strict=True))
        cut = () if keep is None or not shared else (self.sites, keep)
        return weight_bytes(self.lm, *cut, rows=self.batch) + kv


def decode(run: Run, shape: str, lm: Any, gbs: float) -> None:
    """All cells of a model for which there is time; the longest so far says how long the next may take."""
    for cell in run.options.cells.split(","):
        batch, context = (int(x) for x in cell.split("x"))
        key = {"shape": shape, "layers": len(find_sites(lm)), "batch": batch, "context": context}
        if run.known("gpu_decode", **key):
            continue
        what = f"{shape} batch {batch} context {context}"
        if run.left() < run.longest:
            run.say(f"{what}: not measured, out of time")
            continue
        began = time.monotonic()
        with run.attempt(what):
            measure(run, Cell(run, lm, batch, context), key, gbs)
        torch.compiler.reset()
        run.longest = max(run.longest, time.monotonic() - began)


def measure(run: Run, cell: Cell, key: dict[str, Any], gbs: float) -> None:
    """One cell: every variant in turn, one record each, one row of the table."""
    work, execution = cell.variants()
    captures = execution.captures
    samples = interleaved(work, run.options.rounds)
    if execution.captures != captures:
        raise RuntimeError(f"switching heads captured again: {captures} captures became {execution.captures}")
    times = {name: [s[0] if isinstance(s, tuple) else s for s in values] for name, values in samples.items()}
    dense = cell.bytes(None)
    row: dict[str, Any] = {**key, "variants": {}, "costs_s": cell.costs, "peaks_gib": cell.peaks, "ways_ms": cell.ways}
    for name, values in times.items():
        kind, _, ratio = name.partition(" ")
        kept = kind in ("masked", "compact", "rows")
        keep = random_keep(cell.geometries, float(ratio)) if kept else None
        step_bytes = cell.bytes(keep if kind in ("compact", "rows") else None, shared=kind != "rows")
        best = ceiling(dense, cell.bytes(keep, shared=kind != "rows")) if kept else 1.0
        speed, time_ms = paired_ratio(times["dense"], values), summary(values)
        switch = summary([s[1] for s in samples[name]]).median if kept else None
        extra = {
            "variant": name, "p20": time_ms.p20, "p80": time_ms.p80, "n": time_ms.n, "ratio_to_dense": speed.median,
            "ratio_ci95": speed.ci95, "ceiling": best, "realised_share": realised_share(speed.median, best),
            "bytes": step_bytes, "roof_ms": step_bytes / gbs / 1e6, "bandwidth_gbs": gbs, "switch_ms": switch,
            "break_even_tokens": break_even_tokens(switch, summary(times["dense"]).median, time_ms.median)
            if switch is not None else None,
            "captures": captures, "costs_s": cell.costs, "peaks_gib": cell.peaks, "ways_ms": cell.ways,
            "way": min(cell.ways, key=cell.ways.__getitem__, default=run.options.ours),
        }  # fmt: skip
        row["variants"][name] = {"ms": time_ms.median, **extra}
        run.write("gpu_decode", time_ms.median, "ms", key, **extra)
    run.rows.append(row)
    print(table([row]), flush=True)
    for name in [name for name in work if name == "dense" or name.startswith("compact")][:2]:
        with run.attempt(f"kernels of a step, {name}"):
            kernels(run, {**key, "of": name}, work[name])


def kernels(run: Run, key: dict[str, Any], burst: Callable[[], Any]) -> None:
    """Where a step's time goes: the kernels that take most of it, for whoever wants to close the gap."""
    kind = "CUDA" if run.device.type == "cuda" else "CPU"
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profile:
        burst()
    spent = "self_device_time_total" if kind == "CUDA" else "self_cpu_time_total"
    spent_in = [(e.key, e.count, getattr(e, spent) / 1e3) for e in profile.key_averages()]
    spent_in = sorted((f for f in spent_in if f[2] > 0), key=lambda f: -f[2])
    steps, total = run.options.steps + 1, sum(ms for _, _, ms in spent_in)
    top = [(name[:60], count / steps, ms / steps) for name, count, ms in spent_in[:10]]
    run.write("gpu_kernels", total / steps, "ms", key, top=top)
    print(f"  {key['of']}: {total / steps:.3f} ms in kernels, of which", flush=True)
    print("\n".join(f"  {ms:>8.3f} ms in {count:>6.1f} of {name}" for name, count, ms in top), flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds a step; for pruned variants the speed-up over ours dense, its ceiling, its share, and the switch."""
    lines = []
    for row in rows:
        lines.append(f"{row['shape']}, {row['layers']} layers, batch {row['batch']}, context {row['context']}")
        for name, v in row["variants"].items():
            line = f"  {name:<20}{v['ms']:>9.3f} ms   roof {v['roof_ms']:>7.3f}"
            if v["switch_ms"] is not None:
                share = "" if v["realised_share"] is None else f"{v['realised_share']:.0%}"
                line += (
                    f"   ×{v['ratio_to_dense']:.3f} of ×{v['ceiling']:.3f} {share:>6}"
                    f"   switch {v['switch_ms']:.2f} ms, paid back after {v['break_even_tokens'] or 'no'} tokens"
                )
            lines.append(line)
        for what, unit, digits in (("ways_ms", "ms", 3), ("costs_s", "s", 1), ("peaks_gib", "GiB", 2)):
            if row[what]:
                figures = ", ".join(f"{name} {value:.{digits}f}" for name, value in row[what].items())
                lines.append(f"  {what.partition('_')[0]}, {unit}: {figures}")
    return "\n".join(lines)


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was promised of these rows, and whether it was kept."""
    promised = {("phi3-mini", 1, 512): 1.07, ("phi3-mini", 16, 4096): 1.2}
    held: list[tuple[str, float, float]] = []
    for row in rows:
        where, variants = f"{row['shape']} {row['batch']} × {row['context']}", row["variants"]
        if compiled := variants.get("hf static compiled"):
            held.append((f"{where}: hf static compiled ÷ ours dense", compiled["ms"] / variants["dense"]["ms"], 1.0))
        for name, v in variants.items():
            if name.startswith("compact") and row["batch"] in (1, 8) and v["realised_share"] is not None:
                held.append((f"{where}: {name}, share of the ceiling", v["realised_share"], 0.9))
            if name.startswith(("compact", "rows")):
                held.append((f"{where}: {name}, steps ÷ switch", v["ms"] / v["switch_ms"], 1.0))
        if bar := promised.get((row["shape"], row["batch"], row["context"])):
            ways = [v["ratio_to_dense"] for name, v in variants.items() if name in ("compact 0.75", "rows 0.75")]
            held += [(f"{where}: a quarter of the heads pruned, speed-up", max(ways), bar)] if ways else []
    return [f"{'kept  ' if value >= bar else 'MISSED'} {value:>6.2f} (bar {bar}) {what}" for what, value, bar in held]


# --- measuring the prompt, and training -------------------------------------------------------------------------------


@torch.inference_mode()
def prefill(run: Run, shape: str, lm: Any) -> None:
    """What measuring a prompt adds to reading it: norms with the decision, and entropies on top."""
    length = 48 if run.options.tiny else 2048
    key = {"shape": shape, "layers": len(find_sites(lm)), "tokens": length}
    if run.known("gpu_looking", **key) or run.left() < 5:
        return
    geometries, clock = [site.geometry for site in find_sites(lm)], Clock(run.device)
    ids = tokens(lm, 1, length)

    def read(*signals: str) -> float:
        with ExitStack() as stack:
            if signals:
                policy = AgentPolicy(geometries, signals=signals).to(run.device)
                stack.enter_context(attached(lm, Pruner(policy)))
            return clock(lambda: lm(ids, use_cache=True, logits_to_keep=1))

    variants = {"dense": read, "norm": lambda: read("norm"), "both": lambda: read("norm", "entropy")}
    samples = interleaved(variants, max(1, 4 * run.options.rounds))
    entropy = [(both - norm + dense) for dense, norm, both in zip(*samples.values(), strict=True)]
    added, whole = (paired_ratio(x, samples["dense"]) for x in (entropy, samples["both"]))
    dense = summary(samples["dense"]).median
    apart = entropy_difference(run.device)
    run.write(
        "gpu_looking", added.median - 1, "ratio", key, n=len(entropy), dense_ms=dense, differs=apart,
        ci95=[x - 1 for x in added.ci95], looking_and_deciding=whole.median - 1,
    )  # fmt: skip
    low, high = (x - 1 for x in added.ci95)
    run.say(
        f"{shape}: a prompt of {length} tokens takes {dense:.2f} ms; entropies add {added.median - 1:+.1%} "
        f"({low:+.1%} to {high:+.1%}; the bar is 2 %), all measuring and deciding {whole.median - 1:+.1%}; entropies "
        f"differ from those by logits by at most {apart:.4f}"
    )


def entropy_difference(device: torch.device) -> float:
    """How far the two ways to an entropy lie apart on this device, in the share of log(n) that agents see."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for rows in (1, 2):  # one prompt's keys go in parts
        query, key = (torch.randn(rows, h, 777, 64, generator=generator).to(device, torch.bfloat16) for h in (8, 4))
        queries = Queries(torch.arange(777, device=device) >= torch.tensor([[0], [200]], device=device)[:rows])
        ((block, visible, weight),) = queries.blocks(None)
        slow = by_logits(query[:, :, block], key.float().transpose(-1, -2), visible, 0.2)
        slow = (slow * weight[:, None]).sum(-1) / queries.count
        quick = entropies([partial_entropy(query, key, queries, scale=0.2)])[0]
        worst = max(worst, float((quick - slow).abs().max()))
    return worst


def training(run: Run, shape: str, lm: Any) -> None:
    """One training step: agents in float32 on a frozen model, gradient checkpointing, 8 × 512 tokens."""
    # Imported here: training needs more packages than decoding, and a machine may lack them.
    from microglia.gate import keep_ratio
    from microglia.passes import Batch, answer_logits
    from microglia.training.loss import answer_losses, gate_entropy

    rows, length = (2, 24) if run.options.tiny else (8, 512)
    key = {"shape": shape, "layers": len(find_sites(lm)), "batch": rows, "tokens": length}
    if run.known("gpu_training_step", **key) or run.left() < 20:
        return
    geometries, device = [site.geometry for site in find_sites(lm)], run.device
    policy = AgentPolicy(geometries).to(device)
    optimizer = torch.optim.AdamW(policy.parameters())
    ids = tokens(lm, rows, length)
    prompt, answer = ids[:, : length // 2], ids[:, length // 2 :]
    batch = Batch(prompt, torch.ones_like(prompt), answer, torch.ones_like(answer))
    pruner = Pruner(policy, Gate("straight-through", temperature=1.0, noise=1.0))

    def step() -> None:
        with ExitStack() as whole:
            logits, trace = answer_logits(lm, batch, pruner, whole=whole)
            loss = (
                answer_losses(logits, batch.labels).mean()
                + 0.1 * keep_ratio(trace.keep).mean()
                + 0.01 * gate_entropy(trace.logits, 1.0)
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    lm.requires_grad_(False)
    if hasattr(lm, "activation_checkpointing_enable"):  # the newer name of the same
        lm.activation_checkpointing_enable({"use_reentrant": False})
    else:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    lm.train()
    try:
        step()
        reset_peak(device)
        spent = summary([Clock(device)(step) for _ in range(run.options.rounds)])
    finally:
        getattr(lm, "activation_checkpointing_disable", lm.gradient_checkpointing_disable)()
        lm.eval()
    peak = peak_bytes(device)
    gib = None if peak is None else peak / GIB
    run.write("gpu_training_step", spent.median, "ms", key, peak_gib=gib, p20=spent.p20, p80=spent.p80, n=spent.n)
    run.say(
        f"{shape}: a training step of {rows} × {length} tokens takes {spent.median:.0f} ms, peak {gib or 0:.1f} GiB"
    )


def parts(run: Run, gbs: float) -> None:
    """Every part of every shape, in the order of what is asked for most, until time is over."""
    only, shapes = run.options.only.split(","), run.options.shapes.split(",")
    for number, shape in enumerate(shapes, 1):
        run.until = run.options.minutes * number / len(shapes)  # what a model leaves over, the next one has
        with run.attempt(shape):
            dtype = torch.float32 if run.options.tiny else torch.bfloat16
            lm = random_model(shape, layers=run.options.layers, dtype=dtype, device=run.device)
            if "prefill" in only:
                with run.attempt(f"{shape}, measuring a prompt"):
                    prefill(run, shape, lm)
            if "training" in only and number == 1:
                with run.attempt(f"{shape}, a training step"):
                    training(run, shape, lm)
            if "decode" in only:
                with torch.inference_mode():
                    decode(run, shape, lm, gbs)
            del lm


def main() -> None:
    """Measure until time is over; then the table."""
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("no CUDA device; on other machines, see that this works with --tiny")
    run = Run(options, device)
    if options.output is not None and options.output.exists():
        run.done = {(r.name, *sorted(r.extra["key"].items())) for r in read_records(options.output) if "key" in r.extra}

    def over(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, over)
        signal.alarm(int(options.minutes * 60) + 60)
    try:
        gbs = bandwidth(device)
        run.write("gpu_bandwidth", gbs, "GB/s", {})
        run.say(f"{circumstances(device)['device']}: reads {gbs:,.0f} GB/s")
        parts(run, gbs)
    except TimeoutError:
        run.say("stopped: the time was over")
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
    print("\n".join(["", table(run.rows), *run.lines, *bars(run.rows)]))


if __name__ == "__main__":
    main()
