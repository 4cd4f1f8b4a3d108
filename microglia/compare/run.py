"""Measure every contender at every keep ratio and seed, on the same prompts and through the same code."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from microglia.benchmark import typical_rows, typical_subject
from microglia.compare.contenders import Contender
from microglia.compare.summary import Cell, Timing
from microglia.errors import ConfigError
from microglia.evaluation.bench import Bench, as_json, from_json
from microglia.gate import Gate, keep_ratio, threshold_for
from microglia.ledger import Ledger
from microglia.policy import Policy
from microglia.sites import find_sites
from microglia.training.held_out import answer_losses

Progress = Callable[[str, int, int], None]
DENSE = "dense"


@dataclass(frozen=True)
class Arena:
    """bench: the prompts that are answered; dial: a bench of others, on which keep ratios become thresholds.

    gate: the agents' own, whose bucket all share. num_runs: of the timing, 0 for none.
    """

    bench: Bench
    dial: Bench
    gate: Gate
    num_runs: int = 20

    def losses(self, policy: Policy | None, gate: Gate | None) -> list[float]:
        bench = self.bench
        return answer_losses(
            bench.model,
            bench.tokenizer,
            bench.examples,
            policy,
            template=bench.task.template,
            gate=gate,
            look=bench.look,
            fill=bench.fill,
            scope=bench.scope,
            batch_size=bench.batch_size,
        )

    def dial_of(self, policy: Policy) -> Callable[[float | None], Gate]:
        """Keep ratio → gate for this policy; None is the decision it was trained to."""
        geometries = [site.geometry for site in find_sites(self.bench.model)]
        logits: list[Tensor] = []

        def gate_at(ratio: float | None) -> Gate:
            if ratio is None:
                return self.gate
            if not logits:
                logits.extend(self.dial.logits(policy))
            return replace(self.gate, threshold=threshold_for(logits, geometries, ratio, self.gate.bucket))

        return gate_at

    def own_keep_ratio(self, policy: Policy) -> float:
        """What a trained policy keeps when it is left to itself."""
        geometries = [site.geometry for site in find_sites(self.bench.model)]
        keep = self.gate.every(self.dial.logits(policy), geometries)
        return float(keep_ratio(keep).mean())


def compare(
    arena: Arena,
    contenders: Sequence[Contender],
    keep_ratios: Sequence[float],
    seeds: Sequence[int],
    *,
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> list[Cell]:
    """One cell for the dense model, then one per contender, keep ratio and seed; timed for the first seed.

    A contender that has one policy for all seeds is measured once. Raises ConfigError for no or unfit ratios or seeds.
    """
    if not keep_ratios or not all(0 < ratio < 1 for ratio in keep_ratios):
        raise ConfigError(f"keep_ratios={list(keep_ratios)} was given; give at least one, each between 0 and 1")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds={list(seeds)} was given; give at least one and none twice")
    for contender in contenders:
        if contender.count not in (None, 1, len(seeds)):
            raise ConfigError(
                f"{contender.name} has {contender.count} policies but {len(seeds)} seeds were given; give one policy, "
                "or one per seed"
            )
    ledger = ledger or Ledger()
    ratios = sorted(set(keep_ratios), reverse=True)
    cells = [_cell(arena, DENSE, None, 1.0, seeds[0], lambda: (None, None), ledger, progress, {})]
    for contender in contenders:
        known: dict[Any, dict[str, Any]] = {}  # a score that no seed changes is measured once
        for place, seed in enumerate(seeds[: contender.count]):
            policy_and_dial = _once(lambda c=contender, p=place, s=seed: _made(arena, c, p, s, progress))  # type: ignore[misc]
            for ratio in ratios:

                def made(ratio: float = ratio, both: Any = policy_and_dial) -> tuple[Policy, Gate]:
                    policy, gate_at = both()
                    return policy, gate_at(ratio)

                identity = contender.identity_of(place)
                cell = _cell(arena, contender.name, identity, ratio, seed, made, ledger, progress, known)
                if place == 0 and arena.num_runs:
                    timing = _timing(arena, contender.name, identity, ratio, policy_and_dial, ledger)
                    cell = replace(cell, timing=timing)
                cells.append(cell)
    return cells


def _made(
    arena: Arena, contender: Contender, place: int, seed: int, progress: Progress | None
) -> tuple[Policy, Callable[[float | None], Gate]]:
    """A contender's policy for a seed (trained ones are counted, others made from it), and its dial."""
    label = f"making {contender.name}"
    if progress:
        progress(label, 0, 1)
    policy = contender.make(seed if contender.count is None else place)
    policy = policy.to(next(arena.bench.model.parameters()).device).eval()
    if progress:
        progress(label, 1, 1)
    return policy, arena.dial_of(policy)


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """`make`, called when it is first needed and never again."""
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


def _cell(
    arena: Arena,
    name: str,
    identity: Any,
    target: float,
    seed: int,
    made: Callable[[], tuple[Policy | None, Gate | None]],
    ledger: Ledger,
    progress: Progress | None,
    known: dict[Any, dict[str, Any]],
) -> Cell:
    def measure() -> dict[str, Any]:
        policy, gate = made()
        same = None if policy is None else policy.fingerprint(), gate
        if same not in known:
            update = (lambda done, total: progress("answers", done, total)) if progress else None
            run = arena.bench.answers(policy, gate, update)
            known[same] = {**as_json(run), "losses": arena.losses(policy, gate)}
        return known[same]

    key = {"cell": "answers", "policy": name, "is": identity, "target": target, "seed": seed}
    row = ledger.get(key if name != DENSE else {"cell": DENSE}, measure)
    return Cell(name, target, seed, from_json(row), tuple(row["losses"]))


def _timing(arena: Arena, name: str, identity: Any, target: float, made: Callable[[], Any], ledger: Ledger) -> Timing:
    def measure() -> dict[str, Any]:
        policy, gate_at = made()
        bench = arena.bench
        subject = typical_subject(bench.model, bench.tokenizer, bench.prompts, policy, gate_at, look=bench.look)
        rows = typical_rows(bench.model, subject, target, num_runs=arena.num_runs)
        return {variant: asdict(row) for variant, row in rows.items() if variant in ("dense", "compact")}

    key = {"cell": "time", "policy": name, "is": identity, "target": target}
    return Timing(**ledger.get({**key, "runs": arena.num_runs}, measure))


def at_keep_ratio(arena: Arena, policy: Policy, keep_ratios: Sequence[float], asked: float | None) -> float:
    """Where adaptivity is judged: what was asked for, else what the agents keep by themselves, if they prune at all."""
    if asked is not None:
        return asked
    own = round(arena.own_keep_ratio(policy), 2)
    return own if 0 < own < 1 else min(keep_ratios, key=lambda ratio: abs(ratio - own))
