"""Train and judge every method on one pretrained model: the records behind the first table of the README.

    python scripts/llm_study.py smollm2 --data ../data --output results/llm
    python scripts/llm_study.py smollm2 --output results/llm --arm agents+recovery/0   # one arm, in this process

An arm is a method with a seed: agents or the static baseline, trained with or without recovery, a fixed criterion, or
random masks. The dense model first writes what all of them learn from and are judged by. Then every arm is a process of
its own, several at a time, the most important first; each appends its records as it goes, and an arm whose records are
all there is not run again. `--minutes` begins no arm later than that. A GPU does one model in some five minutes; on two
cores an arm takes hours, so choose with `--arms`.

Prompts: those that ship, GSM8K's and ARC-Easy's, from `--data` (folders gsm8k and arc) or wherever the tasks find them;
judged on test questions only, budgets set on validation prompts.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import torch
from torch import Tensor

from microglia import processes
from microglia.anatomy import causal_lm
from microglia.criteria import Calibration, get_criterion
from microglia.evaluation.choices import SCORINGS, score_choices
from microglia.evaluation.closeness import closeness
from microglia.evaluation.setup import Setup
from microglia.experiments.judge import closeness_figures, judge, texts_of
from microglia.ledger import Ledger
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.record import Record, append_records, circumstances, read_records
from microglia.results import Figure
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from microglia.tasks.prompts import example_prompt
from microglia.training import RunFolder, TrainingConfig, train
from microglia.training.continuations import continuations, weights_checksum
from microglia.training.static_baseline import LEARNING_RATE

FIXED = ("norm", "taylor", "fluctuation", "random")
HEADS = (0.9, 0.8, 0.75, 0.7)  # kept shares of the heads at which heads alone are judged
WHOLE = 0.75  # where answers are written freely as well
BYTES = (0.75, 0.5)  # shares of a step's bytes, where channels are decided about too
LEAST = 0.25  # of every layer: left alone, training empties the early ones
NAME = "llm_study"


@dataclass(frozen=True)
class Arm:
    """What is compared. method: agents, static or one of FIXED. units: head, or head and channel."""

    method: str
    recovery: bool
    seed: int
    channels: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}{'+channels' * self.channels}{'+recovery' * self.recovery}/{self.seed}"

    @property
    def shares(self) -> tuple[float, ...]:
        return BYTES if self.channels else HEADS


def arms(seeds: Sequence[int]) -> list[Arm]:
    """All arms, the most important first."""
    first, *others = seeds
    learned = ("agents", "static")
    every = [Arm(method, True, first) for method in learned]
    every += [Arm(method, False, first) for method in (*learned, *FIXED)]
    every += [Arm(method, True, first, True) for method in learned]
    every += [Arm(method, True, seed) for seed in others for method in learned]
    every += [Arm(method, True, first) for method in FIXED]
    every += [Arm(method, False, first, True) for method in learned]
    return every + [Arm(method, False, seed) for seed in others for method in learned]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name that microglia knows, or a folder")
    parser.add_argument("--name", help="of the model in records and files, where a folder is given")
    parser.add_argument("--output", type=Path, default=Path("results/llm"), help="folder of records and checkpoints")
    parser.add_argument("--data", type=Path, help="folder with gsm8k and arc")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", help="only arms whose name begins with one of these, separated by commas")
    parser.add_argument("--arm", help="run this arm here")
    parser.add_argument("--at-once", type=int, default=1, help="arms that run side by side")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no arm after that")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="prompts of a training step")
    parser.add_argument("--prompts", type=int, default=3000, help="training prompts")
    parser.add_argument("--tokens", type=int, default=128, help="longest continuation")
    parser.add_argument("--rank", type=int, default=4, help="of the recovery")
    parser.add_argument("--texts", type=int, default=160, help="test prompts for KL and agreement")
    parser.add_argument("--arc", type=int, default=600, help="questions of ARC-Easy, by likelihood")
    parser.add_argument("--gsm8k", type=int, default=0, help="questions of GSM8K, by generation, at 75 %% and dense")
    parser.add_argument("--judge-batch", type=int, default=128, help="prompts of an evaluation batch")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    return parser.parse_args()


class Study:
    """One model, its data and its records."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.name = options, options.name or options.model
        self.folder: Path = options.output / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        places = {"gsm8k": "gsm8k", "arc-easy": "arc"}
        self.places = {task: None if options.data is None else options.data / f for task, f in places.items()}
        given = [name if place is None else f"{name}={place}" for name, place in self.places.items()]
        self.sources = ",".join(["shipped", *given])

    def records(self, arm: Arm) -> Path:
        """The file of an arm's records."""
        return self.folder / f"{arm.name.replace('/', '-')}.jsonl"

    def finished(self, arm: Arm) -> bool:
        """Whether an arm's last record is there."""
        path = self.records(arm)
        return path.exists() and any(r.name == f"{NAME}_done" for r in read_records(path))

    def system(self, arm: Arm) -> MicrogliaPruningSystem:
        """The model with an untrained pruner of the arm."""
        units = ("head", "channel") if arm.channels else ("head",)
        system = MicrogliaPruningSystem(
            self.options.model,
            policy="agents",
            units=units,
            least_kept=LEAST,
            seed=arm.seed,
            dtype=getattr(torch, self.options.dtype),
        )
        if arm.method != "agents":
            geometries = [site.geometry for site in system.pruner.sites(system.model)]
            policy = StaticPolicy.all_kept(geometries).to(causal_lm(system.model).device)
            system.pruner = replace(system.pruner, policy=policy)
        return system

    def config(self, arm: Arm) -> TrainingConfig:
        """How an arm is trained; fixed criteria train their recovery alone."""
        o = self.options
        fixed = arm.method in FIXED
        share = None if fixed else min(BYTES) if arm.channels else min(HEADS)
        return TrainingConfig(
            max_steps=o.steps,
            batch_size=o.batch,
            limit=o.prompts,
            eval_limit=32,
            eval_steps=o.steps,
            save_steps=o.steps,
            continuation_tokens=o.tokens,
            target="model",
            learning_rate=LEARNING_RATE if arm.method == "static" else 5e-3,
            start=None if fixed or arm.channels else "norm",
            keep_ratio=None if arm.channels else share,
            byte_share=share if arm.channels else None,
            alpha=(0.0, 0.0) if fixed else (0.01, 0.3),
            beta=0.0 if fixed else 0.01,
            noise=(0.0, 0.0) if fixed else (1.0, 0.0),
            recovery=o.rank if arm.recovery else 0,
            seed=arm.seed,
        )

    def write(self) -> None:
        """What the dense model says to every prompt, once and in large batches; arms find it in the cache."""
        system, task = self.system(Arm("static", False, 0)), get_task("prompts")
        config = self.config(Arm("static", False, 0))
        splits = {"train": config.limit, "validation": 64}
        prompts = [
            example_prompt(system.tokenizer, example, task.template)
            for split, limit in splits.items()
            for seed in map(int, self.options.seeds.split(","))
            for example in task.load(split, limit=limit, seed=seed, data_dir=self.sources)
        ]
        began = time.monotonic()
        made = continuations(
            system.model, system.tokenizer, prompts, max_new_tokens=config.continuation_tokens, batch_size=512
        )
        tokens, ended = sum(len(c.answer_ids) for c in made), sum(c.finished for c in made) / len(made)
        print(f"{len(made)} continuations, {tokens:,} tokens, {ended:.0%} ended, {time.monotonic() - began:.0f} s")
        self.judged(system, None, {})

    def run(self, arm: Arm) -> None:
        """Train an arm, set its budget, judge it at every share."""
        began = time.monotonic()
        torch.manual_seed(arm.seed)
        system = self.system(arm)
        if arm.method in FIXED:
            self._fixed(system, arm)
        else:
            system.train("prompts", data_dir=self.sources, quiet=True, on_log=print, **vars(self.config(arm)))
            system.save_pretrained(self.folder / arm.name.replace("/", "-"))
        self._note(arm, "seconds_to_train", time.monotonic() - began, "s", {})
        for share in arm.shares:
            at = {"byte_share": share} if arm.channels else {"keep_ratio": share}
            pruner = system.pruner.at(**at)
            if arm.method in FIXED and arm.recovery:
                pruner = self._recovered(system, arm, pruner)
            self.judged(system, pruner, at, arm)
        self._note(arm, "done", time.monotonic() - began, "s", {})

    def _fixed(self, system: MicrogliaPruningSystem, arm: Arm) -> None:
        """Scores of a criterion on the dense model's own answers, or random ones; a budget as learned arms get it."""
        task, device = get_task("prompts"), causal_lm(system.model).device
        if arm.method == "random":
            geometries = [site.geometry for site in system.pruner.sites(system.model)]
            policy: Any = StaticPolicy.random(geometries, arm.seed)
        else:
            criterion = get_criterion(arm.method)
            examples = task.load("train", limit=criterion.examples, seed=arm.seed, data_dir=self.sources)
            policy = criterion.policy(Calibration(system.model, system.tokenizer, task, examples, least_kept=LEAST))
        pruner = replace(system.pruner, policy=policy.to(device).requires_grad_(False))
        held_out = task.load("validation", limit=64, seed=arm.seed, data_dir=self.sources)
        system.pruner = system._calibrated(task, held_out, pruner, self.config(arm))

    def _recovered(self, system: MicrogliaPruningSystem, arm: Arm, pruner: Pruner) -> Pruner:
        """A recovery for the mask that a fixed policy keeps, trained as the others' are; the mask stays."""
        threshold = pruner.gate.threshold
        logits: list[Tensor] = [x.detach() - threshold for x in pruner.policy.logits]  # type: ignore[union-attr]
        policy = StaticPolicy(logits).to(causal_lm(system.model).device).requires_grad_(False)
        fixed = replace(pruner.with_threshold(0.0), policy=policy, budget=None)
        folder = self.folder / f"{arm.name.replace('/', '-')}-{threshold:.4f}"
        result = train(
            system.model,
            system.tokenizer,
            get_task("prompts"),
            fixed,
            self.config(arm),
            RunFolder(folder, quiet=True),
            data_dir=self.sources,
        )
        return result.pruner.with_threshold(0.0)

    # --- judging ------------------------------------------------------------------------------------------------------

    def judged(
        self, system: MicrogliaPruningSystem, pruner: Pruner | None, at: dict[str, float], arm: Arm | None = None
    ) -> None:
        """All figures of a pruner at one share; without one the dense answers, which all arms then start from."""
        o, dense = self.options, self.folder / "dense.ledger.jsonl"
        path = dense if arm is None else self.records(arm).with_suffix(".ledger.jsonl")
        if not path.exists() and dense.exists():
            shutil.copyfile(dense, path)
        ledger = Ledger(path, {"weights": weights_checksum(system.model)})
        whole = not at or at == {"keep_ratio": WHOLE} or "byte_share" in at
        for name, limit, longest in (("prompts", o.texts, o.tokens), ("arc-easy", o.arc, 1), ("gsm8k", o.gsm8k, 320)):
            if not limit or (name == "gsm8k" and not whole):
                continue
            task, began = get_task(name), time.monotonic()
            place = self.sources.rpartition(",")[0] if name == "prompts" else self.places[name]
            examples = task.load("test", limit=limit, data_dir=place)
            setup = Setup(
                system.model, system.tokenizer, task, examples, batch_size=o.judge_batch, max_new_tokens=longest
            )
            for figure in _figures(setup, pruner, ledger, written=whole):
                assert arm is not None
                self._figure(arm, figure, at)
            print(f"{arm.name if arm else 'dense'} {at} {name}: {time.monotonic() - began:.0f} s", flush=True)

    def _figure(self, arm: Arm, figure: Figure, at: dict[str, float]) -> None:
        difference = figure.difference
        extra: dict[str, Any] = {"dataset": figure.dataset, "prompts": figure.prompts, "dense": figure.dense, **at}
        if difference is not None:
            extra |= {"difference": difference.diff, "ci95": list(difference.ci95)}
        self._note(arm, figure.measure, figure.pruned, "", extra)

    def _note(self, arm: Arm, measure: str, value: float, unit: str, extra: dict[str, Any]) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        what = {"model": self.name, "arm": arm.name, "method": arm.method, "recovery": arm.recovery}
        what |= {"channels": arm.channels, "steps": self.options.steps, "batch": self.options.batch, **extra}
        record = Record(f"{NAME}_{measure}", value, unit, n=1, seed=arm.seed, extra=what, **circumstances(device))
        append_records(self.records(arm), [record])


def _figures(setup: Setup, pruner: Pruner | None, ledger: Ledger, *, written: bool) -> Sequence[Figure]:
    """All figures of one data set. written: among them those of answers that the pruned model writes by itself.

    Without a pruner there are none, and the dense answers and choices go into the ledger.
    """
    chosen = setup.task.scoring in SCORINGS
    if pruner is None:
        _ = score_choices(setup, ledger=ledger) if chosen else setup.answers(None, ledger=ledger)
        return []
    if chosen or written:
        return judge(setup, pruner, ledger=ledger).figures
    texts = texts_of(setup, ledger)
    return closeness_figures(
        setup.task.name, closeness(setup.model, texts, pruner, batch_size=setup.batch_size, ledger=ledger)
    )


def side_by_side(study: Study, todo: Sequence[Arm]) -> None:
    """Run arms as processes, a few at a time, until all are done or the time to begin one is over."""
    o = study.options
    until, waiting, running = time.monotonic() + o.minutes * 60, list(todo), dict[Arm, subprocess.Popen[bytes]]()
    while waiting or running:
        for arm, process in [*running.items()]:
            if process.poll() is not None:
                print(f"{arm.name}: {'done' if study.finished(arm) else f'failed, {process.returncode}'}", flush=True)
                del running[arm]
        if waiting and time.monotonic() > until:
            print(f"not begun: {', '.join(arm.name for arm in waiting)}", flush=True)
            waiting = []
        while waiting and len(running) < o.at_once:
            arm = waiting.pop(0)
            log = study.records(arm).with_suffix(".log").open("ab")
            running[arm] = subprocess.Popen([sys.executable, *sys.argv, "--arm", arm.name], stdout=log, stderr=log)
        time.sleep(0.5)


def chosen(study: Study) -> Iterator[Arm]:
    """The arms that are asked for and not finished."""
    wanted = study.options.arms.split(",") if study.options.arms else [""]
    for arm in arms([int(seed) for seed in study.options.seeds.split(",")]):
        if any(arm.name.startswith(prefix) for prefix in wanted) and not study.finished(arm):
            yield arm


def main() -> None:
    """One arm here, or all of them as processes."""
    options = arguments()
    study = Study(options)
    processes.join()
    if options.arm:
        every = arms([int(seed) for seed in options.seeds.split(",")])
        study.run(next(arm for arm in every if arm.name == options.arm))
        return
    todo = [*chosen(study)]
    study.write()
    side_by_side(study, todo)


if __name__ == "__main__":
    main()
