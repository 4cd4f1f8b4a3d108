"""What looking at a prompt adds to reading it: norms, entropies, and the decision."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from bench.gpu.bench import Bench
from microglia.attach import attached
from microglia.benchmark.latency import Clock, interleaved, paired_ratio, summary
from microglia.policies import AgentPolicy
from microglia.pruner import Pruner
from microglia.signals import Queries
from microglia.signals.entropy import by_logits, entropies, partial_entropy
from microglia.units import find_sites

LENGTH, TINY_LENGTH = 2048, 48  # tokens
TURNS = 3  # measurements here for one of a decode step: a prompt's time spreads more


@torch.inference_mode()
def looking(bench: Bench, shape: str) -> None:
    """One prompt read densely, with norms and a decision, and with entropies too; all in turn."""
    lm = bench.model(shape)
    geometries, clock = [site.geometry for site in find_sites(lm)], Clock(bench.device)
    length = TINY_LENGTH if bench.options.tiny else LENGTH
    key = {"shape": shape, "layers": len(geometries), "tokens": length}
    ids = bench.tokens(lm, 1, length)

    def read(*signals: str) -> float:
        with ExitStack() as stack:
            if signals:
                policy = AgentPolicy(geometries, signals=signals).to(bench.device)
                stack.enter_context(attached(lm, Pruner(policy)))
            return clock(lambda: lm(ids, use_cache=True, logits_to_keep=1))

    variants = {"dense": read, "norm": lambda: read("norm"), "both": lambda: read("norm", "entropy")}
    samples = interleaved(variants, TURNS * bench.options.rounds)
    turns = list(zip(samples["dense"], samples["norm"], samples["both"], strict=True))
    added = paired_ratio([both - norm + dense for dense, norm, both in turns], samples["dense"])
    norms, whole = (paired_ratio(samples[name], samples["dense"]) for name in ("norm", "both"))
    bench.write(
        "gpu_looking", added.median - 1, "ratio", key, n=len(turns), dense_ms=summary(samples["dense"]).median,
        ci95=_less(added.ci95), norms_and_deciding=norms.median - 1, looking_and_deciding=whole.median - 1,
        looking_ci95=_less(whole.ci95), differs=entropy_difference(bench.device),
    )  # fmt: skip


def _less(interval: Sequence[float]) -> list[float]:
    return [x - 1 for x in interval]


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
