"""Decoding on a GPU: Hugging Face as it is and compiled, and ours dense, masked and compact, beside their ceilings.

    python bench/gpu.py --output results/gpu.jsonl

One command for one GPU. It ends by itself: a cell (model, batch, context) is begun only if the time left should be
enough, a second call with the same --output goes on where the first one stopped, and a short table comes last. Most of
a cell's time is compilation (Hugging Face's step anew for every shape), so all cells take several calls; `--shapes`,
`--batches`, `--contexts` and `--compile` choose. Random weights: what is measured depends on shapes, and nothing has to
be downloaded. `--tiny` runs all of it in seconds on any machine, to see that it works.
"""

import argparse
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from microglia.attach import attached
from microglia.benchmark.ceiling import break_even_tokens, ceiling, realised_share
from microglia.benchmark.latency import Clock, interleaved, paired_ratio, summary
from microglia.benchmark.memory import kept_weight_bytes, peak_bytes, reset_peak, weight_bytes
from microglia.benchmark.pattern import PatternPolicy, kept_counts, random_keep
from microglia.benchmark.shapes import random_model
from microglia.gate import Gate
from microglia.look import Look
from microglia.policy import AgentPolicy
from microglia.record import Record, append_records, circumstances, read_records
from microglia.replay import GraphDecoder
from microglia.replay.step import Room
from microglia.signals import Queries
from microglia.signals.entropy import by_logits, by_mean_key
from microglia.sites import find_sites
from microglia.training.data import Batch
from microglia.training.loss import gate_entropy, mean_keep, task_loss
from microglia.training.passes import answer_logits

GIB = 2**30


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="phi3-mini,qwen2.5-3b,llama3-8b")
    parser.add_argument("--layers", type=int, help="only so many layers of each")
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--contexts", default="512,4096")
    parser.add_argument("--keep", default="0.75,0.5", help="keep ratios besides 1.0, which is the dense variant")
    parser.add_argument("--stretch", type=int, default=4, help="layers that share a level; see microglia/replay")
    parser.add_argument("--steps", type=int, default=32, help="decode steps in one measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant, taking turns")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin nothing after that; the whole ends soon after"
    )
    parser.add_argument("--compile", default="hf,ours", help="what goes through torch.compile: hf, ours, or none")
    parser.add_argument("--only", default="decode,prefill,training", help="parts to measure")
    parser.add_argument("--output", type=Path, help="file of records to append to, and to go on from")
    parser.add_argument("--tiny", action="store_true", help="the whole programme on the reasoner, in seconds")
    options = parser.parse_args()
    if options.tiny:
        options.shapes, options.layers, options.batches, options.contexts = "reasoner", 2, "1,2", "24"
        options.steps, options.rounds, options.stretch, options.compile = 2, 1, 1, "none"
    return options


@dataclass
class Run:
    """What all parts share: options, device, what was found, and how long there is."""

    options: argparse.Namespace
    device: torch.device
    began: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    done: set[tuple[Any, ...]] = field(default_factory=set)

    def left(self) -> float:
        """Seconds in which something may still begin."""
        return self.options.minutes * 60 - (time.monotonic() - self.began)

    def known(self, name: str, **key: Any) -> bool:
        """Whether the file of records has this already."""
        return (name, *sorted(key.items())) in self.done

    def write(self, name: str, value: float, unit: str, key: dict[str, Any], **extra: Any) -> None:
        """Append one record."""
        if self.options.output is not None:
            record = Record(name, value, unit, seed=0, extra={**key, **extra, "key": key}, **circumstances(self.device))
            append_records(self.options.output, [record])

    def say(self, line: str) -> None:
        """A line now, and again at the end."""
        print(line, flush=True)
        self.lines.append(line)


class Stamps(StoppingCriteria):
    """Stops nothing; notes when each step of a `generate` is over, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, list[Any]()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def step_ms(self) -> float:
        """Mean time of a decode step; the first mark stands after the prefill."""
        first, last = self.marks[0], self.marks[-1]
        if self.device.type == "cuda":
            last.synchronize()
            return float(first.elapsed_time(last)) / (len(self.marks) - 1)
        return float(last - first) * 1e3 / (len(self.marks) - 1)


def bandwidth(device: torch.device) -> float:
    """GB/s at which the device reads: the best of ten sums over a tensor that no cache holds."""
    size = 4 * GIB if device.type == "cuda" else 2**24
    x, clock = torch.ones(size // 4, device=device), Clock(device)
    best = min(clock(lambda: x.sum()) for _ in range(11))
    return size / best / 1e6


# --- decoding ---------------------------------------------------------------------------------------------------------


class Cell:
    """One model, one batch size, one context."""

    def __init__(self, run: Run, lm: Any, batch: int, context: int) -> None:
        self.run, self.lm, self.batch, self.context = run, lm, batch, context
        self.steps, self.clock = run.options.steps, Clock(run.device)
        self.ids = torch.randint(lm.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
        self.ids = self.ids.to(run.device)
        self.sites = find_sites(lm)
        self.peaks: dict[str, float] = {}
        self.costs: dict[str, float] = {}

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

    def hf(self, **options: Any) -> float:
        """Milliseconds of a decode step inside the library's own `generate`."""
        stamps = Stamps(self.run.device)
        self.lm.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=self.steps + 1, do_sample=False,
            eos_token_id=None, pad_token_id=0, stopping_criteria=[stamps], **options,
        )  # fmt: skip
        return stamps.step_ms()

    def variants(self) -> dict[str, Callable[[], Any]]:
        """Every variant, warm: compiled, captured, its memory noted."""
        compiled = self.run.options.compile.split(",")
        static = {"cache_implementation": "static", "disable_compile": "hf" not in compiled}
        work: dict[str, Callable[[], Any]] = {"hf": self.hf, "hf static compiled": lambda: self.hf(**static)}
        with self.peak("hf"):
            work["hf"]()
        with self.peak("hf static compiled"):
            began = time.monotonic()
            work["hf static compiled"]()
            self.costs["hf compile s"] = time.monotonic() - began
            work["hf static compiled"]()
        with self.peak("ours"):
            work |= self.ours("ours" in compiled)
        return work

    def ours(self, compiled: bool) -> dict[str, Callable[[], Any]]:
        """Captured steps: dense, and masked and compact at every keep ratio."""
        decoder = GraphDecoder(self.lm, stretch=self.run.options.stretch, compiled=compiled)
        began = time.monotonic()
        room = decoder.room(self.batch, self.context + self.steps + 2)
        self.costs["capture dense s"] = time.monotonic() - began
        mask = torch.ones_like(self.ids)
        with decoder.serving(mask, self.steps + 2):
            self.lm(self.ids, past_key_values=room.cache, logits_to_keep=1)
        geometries = [site.geometry for site in self.sites]
        work: dict[str, Callable[[], Any]] = {"dense": lambda: self.burst(room, mask, None)}
        for ratio in self.ratios():
            shared = [k.to(self.run.device) for k in random_keep(geometries, ratio)]
            rows = [k.to(self.run.device) for k in random_keep(geometries, ratio, rows=self.batch)]
            work[f"masked {ratio}"] = lambda keep=shared: self.burst(room, mask, keep, masked=True)
            work[f"compact {ratio}"] = lambda keep=shared: self.burst(room, mask, keep)
            if self.batch > 1:
                work[f"rows {ratio}"] = lambda keep=rows: self.burst(room, mask, keep)
        for name, variant in work.items():
            began = time.monotonic()
            variant()
            self.costs[f"capture {name} s"] = time.monotonic() - began
        self.captures = decoder.captures, decoder
        return work

    def burst(self, room: Room, mask: Tensor, keep: Sequence[Tensor] | None, *, masked: bool = False) -> tuple:
        """Milliseconds of a step, and of the switch before it.

        The same prompt is switched again and again, so its keys end up in wrong places: the times do not know.
        """
        every = [torch.ones(1, site.geometry.heads, device=self.run.device) for site in self.sites]
        room.clear((), 0)
        room.read(mask)
        switch = self.clock(lambda: room.decide(every if keep is None else keep, None, masked=masked))

        def steps() -> None:
            for _ in range(self.steps):
                room.step()

        room.step()
        return self.clock(steps) / self.steps, switch

    def ratios(self) -> list[float]:
        return [float(x) for x in self.run.options.keep.split(",") if float(x) < 1]

    def bytes(self, keep: Sequence[Tensor] | None, *, shared: bool = True) -> int:
        """What a step reads: weights, and keys and values of the tokens that are there."""
        geometries = [site.geometry for site in self.sites]
        token = 2 * self.batch * self.context * self.lm.dtype.itemsize
        whole = [token * g.kv_width for g in geometries]
        if keep is None:
            return int(weight_bytes(self.lm, rows=self.batch) + sum(whole))
        weights = kept_weight_bytes(self.lm, self.sites, keep, rows=self.batch)
        kept = [
            kv * kept_counts(site, k)[1] // site.geometry.kv_heads
            for kv, site, k in zip(whole, self.sites, keep, strict=True)
        ]
        return int((weights if shared else weight_bytes(self.lm, rows=self.batch)) + sum(kept))


def decode(run: Run, shape: str, lm: Any, gbs: float) -> None:
    """All cells of a model for which there is time; the longest so far says how long the next may take."""
    longest = 0.0
    for batch in (int(x) for x in run.options.batches.split(",")):
        for context in (int(x) for x in run.options.contexts.split(",")):
            key = {"shape": shape, "layers": lm.config.num_hidden_layers, "batch": batch, "context": context}
            if run.known("gpu_decode", **key):
                continue
            if run.left() < longest:
                run.say(f"{shape} batch {batch} context {context}: not measured, out of time")
                continue
            began = time.monotonic()
            try:
                measure(run, Cell(run, lm, batch, context), key, gbs)
            except torch.OutOfMemoryError:
                run.say(f"{shape} batch {batch} context {context}: not measured, out of memory")
            torch.compiler.reset()
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
            longest = max(longest, time.monotonic() - began)


def measure(run: Run, cell: Cell, key: dict[str, Any], gbs: float) -> None:
    """One cell: every variant in turn, one record each, one row of the table."""
    work = cell.variants()
    captures, decoder = cell.captures
    samples = interleaved(work, run.options.rounds)
    if decoder.captures != captures:
        raise RuntimeError(f"switching heads captured again: {captures} captures became {decoder.captures}")
    times = {name: [s[0] if isinstance(s, tuple) else s for s in values] for name, values in samples.items()}
    dense = cell.bytes(None)
    row: dict[str, Any] = {**key, "variants": {}}
    geometries = [site.geometry for site in cell.sites]
    for name, values in times.items():
        kind, _, ratio = name.partition(" ")
        kept = kind in ("masked", "compact", "rows")
        keep = random_keep(geometries, float(ratio)) if kept else None
        own = cell.bytes(keep if kind in ("compact", "rows") else None, shared=kind != "rows")
        best = ceiling(dense, cell.bytes(keep, shared=kind != "rows")) if kept else 1.0
        speed, found = paired_ratio(times["dense"], values), summary(values)
        switch = summary([s[1] for s in samples[name]]).median if kept else None
        extra = {
            "variant": name, "p20": found.p20, "p80": found.p80, "n": found.n, "ratio_to_dense": speed.median,
            "ratio_ci95": speed.ci95, "ceiling": best, "realised_share": realised_share(speed.median, best),
            "bytes": own, "roof_ms": own / gbs / 1e6, "bandwidth_gbs": gbs, "switch_ms": switch,
            "break_even_tokens": break_even_tokens(switch, summary(times["dense"]).median, found.median)
            if switch is not None else None,
            "captures": captures, "costs_s": cell.costs, "peaks_gib": cell.peaks, "stretch": run.options.stretch,
            "compiled": run.options.compile,
        }  # fmt: skip
        run.write("gpu_decode", found.median, "ms", key, **extra)
        row["variants"][name] = {"ms": found.median, **extra}
    run.rows.append(row)
    print(table([row]), flush=True)


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
                    f"   ×{v['ratio_to_dense']:.3f} of ×{v['ceiling']:.3f} {share:>6}   switch {v['switch_ms']:.2f} ms"
                )
            lines.append(line)
        first = next(iter(row["variants"].values()))
        lines.append(
            "  seconds: " + ", ".join(f"{name.removesuffix(' s')} {s:.1f}" for name, s in first["costs_s"].items())
        )
        lines.append("  peak GiB: " + ", ".join(f"{name} {gib:.2f}" for name, gib in first["peaks_gib"].items()))
    return "\n".join(lines)


# --- looking at the prompt, and training ------------------------------------------------------------------------------


def prefill(run: Run, shape: str, lm: Any) -> None:
    """What looking at a prompt adds to reading it, both signals and the norm alone."""
    length = 48 if run.options.tiny else 2048
    key = {"shape": shape, "layers": lm.config.num_hidden_layers, "tokens": length}
    if run.known("gpu_looking", **key) or run.left() < 5:
        return
    geometries, clock = [site.geometry for site in find_sites(lm)], Clock(run.device)
    ids = torch.randint(lm.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(run.device)
    policy = PatternPolicy(geometries, random_keep(geometries, 1.0)).to(run.device)

    def read(look: Look | None = None) -> float:
        def work() -> None:
            lm(ids, use_cache=True, logits_to_keep=1)

        if look is None:
            return clock(work)
        with attached(lm, policy, look=look):
            return clock(work)

    samples = interleaved({"dense": read, "looking": lambda: read(Look())}, max(1, 4 * run.options.rounds))
    added, found = paired_ratio(samples["looking"], samples["dense"]), summary(samples["dense"])
    run.write("gpu_looking", added.median - 1, "ratio", key, ci95=added.ci95, dense_ms=found.median)
    low, high = (x - 1 for x in added.ci95)
    if device_differs := entropy_difference(run.device):
        run.say(f"entropy by the mean key differs from the entropy by logits by at most {device_differs:.4f}")
    run.say(
        f"{shape}: a prompt of {length} tokens takes {found.median:.2f} ms; looking and deciding add "
        f"{added.median - 1:+.1%} ({low:+.1%} to {high:+.1%})"
    )


def entropy_difference(device: torch.device) -> float:
    """How far the two ways to an entropy lie apart on this device, in the share of log(n) that agents see."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, h, 512, 64, generator=generator).to(device, torch.bfloat16) for h in (8, 4))
    tokens = torch.arange(512, device=device) >= torch.tensor([[0], [200]], device=device)
    ((block, visible, weight),) = Queries(tokens).blocks(None)
    keys, q = key.float().transpose(-1, -2), query[:, :, block]
    apart = by_mean_key(q, key, visible, 0.2) - by_logits(q, keys, visible, 0.2)
    return float((apart * weight[:, None]).abs().max())


def training(run: Run, shape: str, lm: Any) -> None:
    """One training step: agents in float32 on a frozen model, gradient checkpointing, 8 × 512 tokens."""
    rows, length = (2, 24) if run.options.tiny else (8, 512)
    key = {"shape": shape, "layers": lm.config.num_hidden_layers, "batch": rows, "tokens": length}
    if run.known("gpu_training_step", **key) or run.left() < 20:
        return
    geometries, device = [site.geometry for site in find_sites(lm)], run.device
    policy = AgentPolicy(geometries).to(device)
    optimizer = torch.optim.AdamW(policy.parameters())
    ids = torch.randint(lm.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    prompt, answer = ids[:, : length // 2], ids[:, length // 2 :]
    batch = Batch(prompt, torch.ones_like(prompt), answer, torch.ones_like(answer))
    gate = Gate("straight-through", temperature=1.0, noise=1.0)

    def step() -> None:
        with ExitStack() as whole:
            logits, trace = answer_logits(lm, batch, policy, gate=gate, look=Look(), whole=whole)
            loss = (
                task_loss(logits, batch.labels) + 0.1 * mean_keep(trace.keep) + 0.01 * gate_entropy(trace.logits, 1.0)
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
        found = summary([Clock(device)(step) for _ in range(run.options.rounds)])
    finally:
        getattr(lm, "activation_checkpointing_disable", lm.gradient_checkpointing_disable)()
        lm.eval()
    peak = peak_bytes(device)
    gib = None if peak is None else peak / GIB
    run.write("gpu_training_step", found.median, "ms", key, peak_gib=gib, p20=found.p20, p80=found.p80)
    run.say(
        f"{shape}: a training step of {rows} × {length} tokens takes {found.median:.0f} ms, peak {gib or 0:.1f} GiB"
    )


def main() -> None:
    """Measure, in the order of what is asked for most, until time is over; then the table."""
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
    gbs, parts = bandwidth(device), options.only.split(",")
    run.write("gpu_bandwidth", gbs, "GB/s", {})
    run.say(f"{circumstances(device)['device']}: reads {gbs:,.0f} GB/s")
    minutes, shapes = options.minutes, options.shapes.split(",")
    try:
        for number, shape in enumerate(shapes, 1):
            run.options.minutes = minutes * number / len(shapes)  # what a model leaves over, the next one has
            dtype = torch.float32 if options.tiny else torch.bfloat16
            lm = random_model(shape, layers=options.layers, dtype=dtype, device=device)
            if "prefill" in parts:
                with torch.inference_mode():
                    prefill(run, shape, lm)
            if "training" in parts and number == 1:
                training(run, shape, lm)
            if "decode" in parts:
                with torch.inference_mode():
                    decode(run, shape, lm, gbs)
            del lm
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except TimeoutError:
        run.say("stopped: the time was over")
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
    print("\n" + table(run.rows))
    print("\n".join(run.lines))


if __name__ == "__main__":
    main()
