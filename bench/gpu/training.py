"""One training step: agents in float32 on a frozen model, with gradient checkpointing."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from bench.gpu.bench import GIB, Bench
from microglia.benchmark.latency import Clock, summary
from microglia.benchmark.memory import peak_bytes, reset_peak
from microglia.gate import Gate, keep_ratio
from microglia.policies import AgentPolicy
from microglia.pruner import Pruner
from microglia.units import find_sites

SIZE, TINY_SIZE = (8, 512), (2, 24)  # rows, tokens of prompt and answer


def training(bench: Bench, shape: str) -> None:
    """A step after one to warm up, and the most memory that it held."""
    rows, length = TINY_SIZE if bench.options.tiny else SIZE
    lm = bench.model(shape)
    key = {"shape": shape, "layers": len(find_sites(lm)), "batch": rows, "tokens": length}
    with trainable(lm):
        step = training_step(bench, lm, rows, length)
        step()
        reset_peak(bench.device)
        spent = summary([Clock(bench.device)(step) for _ in range(bench.options.rounds)])
    peak = peak_bytes(bench.device)
    gib = None if peak is None else peak / GIB
    bench.write("gpu_training_step", spent.median, "ms", key, peak_gib=gib, p20=spent.p20, p80=spent.p80, n=spent.n)


def training_step(bench: Bench, lm: Any, rows: int, length: int) -> Callable[[], None]:
    """A step on random texts, the first half of each a prompt."""
    # Imported here: training needs more packages than decoding, and a machine may lack them.
    from microglia.passes import Batch, answer_logits
    from microglia.training.loss import answer_losses, gate_entropy

    policy = AgentPolicy([site.geometry for site in find_sites(lm)]).to(bench.device)
    optimizer = torch.optim.AdamW(policy.parameters())
    prompt, answer = bench.tokens(lm, rows, length).chunk(2, dim=1)
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

    return step


@contextmanager
def trainable(lm: Any) -> Iterator[None]:
    """The model frozen, with gradient checkpointing, as training has it."""
    lm.requires_grad_(False)
    if hasattr(lm, "activation_checkpointing_enable"):  # the newer name of the same
        lm.activation_checkpointing_enable({"use_reentrant": False})
    else:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    lm.train()
    try:
        yield
    finally:
        getattr(lm, "activation_checkpointing_disable", lm.gradient_checkpointing_disable)()
        lm.eval()
