"""MicrogliaPruningSystem: a pruned model's whole life behind one object. Thin: each step is done by its own module."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia import processes
from microglia.anatomy import Anatomy, causal_lm, input_device
from microglia.checkpoint import Checkpoint, check_writable
from microglia.criteria import Calibration, get_criterion, ordered_channels
from microglia.criteria.start import start_from
from microglia.errors import CheckpointError, DataError, MicrogliaError
from microglia.evaluation.setup import Setup
from microglia.execution import Execution, execution_for, kind_of
from microglia.experiments.calibrate import Aim, calibrate, questions_used, unused_examples
from microglia.experiments.judge import judge, result_of
from microglia.explain import Explanation, explain
from microglia.gate import Gate, keep_ratio
from microglia.generation import generate
from microglia.lease import attached_alone
from microglia.ledger import Ledger
from microglia.models import REASONER, load_model
from microglia.policies import new_agents
from microglia.pruner import Fill, Pruner
from microglia.reading import read_prompts
from microglia.results import EvaluationResult, JudgementResult, Promise
from microglia.signals import usual_signals
from microglia.tasks import Example, Task, get_task
from microglia.tasks.prompts import render_prompt
from microglia.tasks.used import question_keys
from microglia.training import RunFolder, TrainingConfig, TrainingResult, train
from microglia.training.asking import with_self_prompts
from microglia.training.continuations import continued, weights_checksum
from microglia.training.loop import examples_of, with_target
from microglia.units import Arrangement, StepCosts, find_sites, step_costs
from microglia.units.step import CONTEXT

START_PROMPTS = 64  # that a criterion sees whose ranks the policy starts from
ORDER_EXAMPLES = 64  # by whose answers channels are ordered
CALIBRATION_PROMPTS = 64  # kept in the checkpoint as logits, from which a keep ratio becomes a threshold
AT_ONCE = 32  # prompts per batch


class MicrogliaPruningSystem:
    """A causal LM and its pruner.

    model: what `load_model` takes: `reasoner`, which ships with the package, another known name, a hub id, a local
        folder, a GGUF file or a module in memory (then pass tokenizer).
    num_heads: checked against the model; None takes the model's. policy: `agents` (an MLP per site) or `mixture` (masks
        that every prompt mixes, docs/results.md). hidden_dim: of an MLP, or the number of masks; None is 128 and 16.
    units: the kinds that are decided about: head, channel, sublayer. signals: what the agents see of a prompt; None is
        what is usual for the units. window, bucket, least_kept, fill, arrangement: see Pruner and Gate.
    seed: of the agents' first weights. dtype: None is float32 on a CPU and the stored type elsewhere.
    quantize: int8 or int4, weight-only, by torchao.
    """

    def __init__(
        self,
        model: str | Path | nn.Module = REASONER,
        num_heads: int | None = None,
        hidden_dim: int | None = None,
        *,
        policy: str = "agents",
        units: Sequence[str] = ("head",),
        signals: Sequence[str] | None = None,
        window: int | None = 64,
        bucket: int | None = None,
        least_kept: float = 0.0,
        fill: Fill = "zero",
        arrangement: Arrangement = Arrangement(),
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **loading: Any,
    ) -> None:
        """loading: dtype, device, quantize and trust_remote_code, see `microglia.models.load_model`."""
        self.model: nn.Module
        self.model, self.tokenizer = load_model(model, tokenizer=tokenizer, **loading)
        self.source = None if isinstance(model, nn.Module) else str(model)
        Anatomy(self.model).check_head_count(num_heads)
        gate = Gate(bucket=bucket, least_kept=least_kept)
        geometries = [site.geometry for site in find_sites(self.model, units, arrangement)]
        gate.check_bucket(geometries)
        signals = usual_signals(units) if signals is None else signals
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            agents = new_agents(policy, geometries, signals=signals, hidden_dim=hidden_dim)
        agents.to(input_device(self.model)).eval()
        self.pruner = Pruner(agents, gate, window, fill, tuple(units), arrangement=arrangement)
        self.template, self.training, self.promise = Task.template, dict[str, Any](), dict[str, Any]()
        self._used: frozenset[str] = frozenset()  # keys of the questions that trained the policy or set its thresholds
        self._keep_ratios: list[float] = []
        self._executions: dict[str, Execution] = {}

    def train(
        self,
        dataset_name: str | Task = "arithmetic",
        num_epochs: float | None = None,
        alpha_schedule: tuple[float, float] | None = None,
        *,
        output_dir: Path | str | None = None,
        data_dir: Path | str | None = None,
        resume: bool = False,
        quiet: bool = False,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        **options: Any,
    ) -> TrainingResult:
        """Train the agents on a task. `options` are the fields of TrainingConfig; what is not given has its default.

        dataset_name: a task's name, or a task with options: get_task("gsm8k", shots=4).
        output_dir: where the run's state and at the end the checkpoint go; None keeps the result in memory only.
        """
        task = get_task(dataset_name)
        given = {"epochs": num_epochs, "alpha": alpha_schedule and tuple(alpha_schedule)}
        config = TrainingConfig.of({**options, **{name: value for name, value in given.items() if value is not None}})
        config = with_target(config, self.model, task)
        if output_dir is not None:
            check_writable(output_dir)
        if config.self_prompts:
            data_dir = with_self_prompts(self.model, self.tokenizer, task, config, data_dir, quiet=quiet)
        if "channel" in self.pruner.units and self.pruner.arrangement.orders is None:
            self.order_channels(task, task.load("train", limit=ORDER_EXAMPLES, seed=config.seed, data_dir=data_dir))
        if config.start is not None:
            few = task.load("train", limit=START_PROMPTS, seed=config.seed, data_dir=data_dir)
            start_from(config.start, self.pruner.policy, self._calibration(task, few, seed=config.seed))
        with tempfile.TemporaryDirectory() if output_dir is None else nullcontext(str(output_dir)) as folder:
            run = RunFolder(folder, resume, quiet, on_log)
            result = train(self.model, self.tokenizer, task, self.pruner, config, run, data_dir=data_dir)
        self.model, self.template, self.promise = result.model, task.template, {}
        self._executions = {}  # they were made for the model without adapters
        held_out = task.load("validation", limit=CALIBRATION_PROMPTS, seed=config.seed, data_dir=data_dir)
        known = [*(example for part in examples_of(task, config, data_dir) for example in part), *held_out]
        self._used |= question_keys(example.question for example in known)
        self.pruner = self._calibrated(task, held_out, result.pruner.with_threshold(0.0), config)
        last = {name: value for row in result.history for name, value in row.items() if isinstance(value, int | float)}
        self.training = {"dataset": task.name, "seconds": result.seconds, "last": last, "config": asdict(config)}
        if output_dir is not None and processes.is_first():
            self.save_pretrained(output_dir)
        processes.wait()
        return replace(result, pruner=self.pruner)

    def order_channels(self, task: Task, examples: Sequence[Example], criterion: str | None = None) -> None:
        """From now on blocks are cut from the channels of every layer in the order of what they add in worked answers.

        criterion: another score, by its name. Training does this by itself, before the agents begin.
        """
        calibration = self._calibration(task, examples, units=("channel",))
        score = None if criterion is None else get_criterion(criterion)
        self.pruner = replace(self.pruner, arrangement=ordered_channels(calibration, score), budget=None)

    @overload
    def generate(self, prompt: str, max_new_tokens: int | None = ..., **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], max_new_tokens: int | None = ..., **options: Any) -> list[str]: ...
    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int | None = None,
        *,
        execution: str | Execution = "compact",
        keep_ratio: float | None = None,
        byte_share: float | None = None,
        raw: bool = False,
        **options: Any,
    ) -> str | list[str]:
        """The answer to a question, or the answers to several; each is written with its own heads.

        execution: compact (heads are gone), masked (the same answer, no time saved), captured (compact, with captured
            steps, for GPUs), dense (no pruning), or an Execution of your own.
        max_new_tokens: 256 unless a generation_config among the options says otherwise.
        keep_ratio, byte_share: this time only, see `set_keep_ratio`. raw: the prompt is complete and gets no template.
        options: of the model's own `generate` (sampling, streamer, stopping); greedy by default.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise DataError("no prompt was given; give at least one")
        pruner, how = self.pruner.at(keep_ratio, byte_share=byte_share), self._execution(execution)
        texts, ratios = list[str](), list[float]()
        for start in range(0, len(prompts), AT_ONCE):
            rendered = self._rendered(prompts[start : start + AT_ONCE], raw)
            output = generate(
                self.model,
                self.tokenizer,
                rendered,
                pruner,
                execution=how,
                max_new_tokens=max_new_tokens,
                **options,
            )
            texts += [text.strip() for text in output.texts]
            ratios += _keep_ratios(output.keep, len(output.texts))
        self._keep_ratios = ratios
        return texts[0] if isinstance(prompt, str) else texts

    def explain(
        self, prompt: str, *, keep_ratio: float | None = None, byte_share: float | None = None, raw: bool = False
    ) -> Explanation:
        """Which units a prompt keeps and why, one by one; nothing is generated. The rest: see `generate`."""
        (rendered,) = self._rendered([prompt], raw)
        return explain(self.model, self.tokenizer, rendered, self.pruner.at(keep_ratio, byte_share=byte_share))

    def get_sparsity(self) -> float:
        """Share of heads that were pruned in the last `generate` or `evaluate`, mean over its prompts."""
        return sum(self.get_sparsities()) / len(self._keep_ratios)

    def get_sparsities(self) -> list[float]:
        """Share of heads that were pruned for each prompt of the last `generate` or `evaluate`."""
        if not self._keep_ratios:
            raise MicrogliaError("no prompt was read yet, so there is no sparsity; call generate or evaluate first")
        return [1 - ratio for ratio in self._keep_ratios]

    def evaluate(
        self,
        dataset_name: str | Task = "arithmetic",
        *,
        split: str = "test",
        limit: int | None = None,
        seed: int = 0,
        data_dir: Path | str | None = None,
        execution: str | Execution = "compact",
        keep_ratio: float | None = None,
        byte_share: float | None = None,
        batch_size: int = AT_ONCE,
        max_new_tokens: int = 256,
        dense: bool = True,
        scoring: str | None = None,
        ledger: Path | str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> EvaluationResult | JudgementResult:
        """Everything that a task tells about the pruned model and (unless dense=False) the dense one, by prompts.

        scoring: None is the task's own: generation, for multiple choice likelihood (or likelihood-per-character), or
        text, where nothing is right or wrong and the result is a JudgementResult; see `experiments.judge`.
        ledger: a file that keeps finished batches, so that the same call goes on where it was interrupted.
        With LoRA, dense has the adapter too. `progress(name, done, total)` is called after every batch.
        """
        task = get_task(dataset_name)
        examples = task.load(split, limit=limit, seed=seed, data_dir=data_dir)
        setup = self._setup(task, examples, execution, batch_size, max_new_tokens)
        pruner = self.pruner.at(keep_ratio, byte_share=byte_share)
        kept = Ledger(ledger, {"weights": weights_checksum(self.model)}) if ledger else None
        judged = judge(setup, pruner, scoring, dense=dense, ledger=kept, progress=progress)
        if "pruned" in judged.runs:
            self._keep_ratios = [answer.keep_ratio for answer in judged.runs["pruned"].answers]
        return result_of(setup, judged, split, scoring)

    def set_keep_ratio(
        self, ratio: float | None = None, prompts: Sequence[str] | None = None, *, byte_share: float | None = None
    ) -> float:
        """From now on so many units are kept on average; prompts still differ. Returns the threshold.

        prompts: questions to calibrate on, all of which count alike; without them the held-out ones of the training are
        used, whose logits the checkpoint holds, weighted by the tokens of their answers. byte_share: in place of a
        ratio, the share of a dense decode step's bytes that is read; see `costs`. Without both it goes back to the
        trained decision.
        """
        if prompts is not None:
            geometries = [site.geometry for site in self.pruner.sites(self.model)]
            read = read_prompts(self.model, self.tokenizer, self._rendered(list(prompts)), self.pruner)
            self.pruner = self.pruner.with_budget(read.logits, geometries, costs=self.costs())
            self._used |= question_keys(prompts)
        self.pruner = self.pruner.with_threshold(0.0).at(ratio, byte_share=byte_share)
        self.promise = {}  # was for another threshold
        return self.pruner.gate.threshold

    def calibrate(
        self,
        dataset_name: str = "arithmetic",
        *,
        split: str = "validation",
        limit: int | None = None,
        seed: int = 0,
        data_dir: Path | str | None = None,
        execution: str | Execution = "compact",
        batch_size: int = AT_ONCE,
        max_new_tokens: int = 256,
        ledger: Path | str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        **aim: Any,
    ) -> Promise:
        """Prune as far as a promise allows, on held-out prompts that training did not use.

        aim: fields of `experiments.calibrate.Aim`: max_drop with confidence, or keep_ratio, or byte_share,
            or latency_ratio.
        ledger: a file that remembers the answers, so that an interrupted calibration goes on.
        """
        task = get_task(dataset_name)
        used = self._used
        if not used and self.training.get("dataset") == dataset_name:
            used = questions_used(task, self.training.get("config", {}), data_dir=data_dir)
        examples = unused_examples(task, split, used, limit=limit, seed=seed, data_dir=data_dir)
        setup = self._setup(task, examples, execution, batch_size, max_new_tokens)
        kept = Ledger(ledger, {"base_model": self.source})
        promise = calibrate(setup, self.pruner, Aim(**aim), ledger=kept, progress=progress)
        settings = {"dataset": dataset_name, "split": split, "limit": limit, "seed": seed}
        identity = setup.identity
        promise = replace(promise, settings=settings | {name: identity[name] for name in ("execution", "examples")})
        self.pruner = self.pruner.with_threshold(promise.threshold)
        self.promise = promise.to_json()
        return promise

    def checkpoint(self) -> Checkpoint:
        """What `save_pretrained` writes, as a value (for `push_to_hub`, say)."""
        return Checkpoint.of(
            self.model,
            self.pruner,
            base_model=self.source,
            template=self.template,
            training=self.training,
            promise=self.promise,
            used=self._used,
        )

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write pruner, configuration, model card and, with LoRA, the adapter; not the base model."""
        return self.checkpoint().save_pretrained(folder, self.model)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """`save_pretrained` into a repository of the hub; returns its address."""
        return self.checkpoint().push_to_hub(repo_id, model=self.model, private=private, token=token)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        model: str | Path | nn.Module | None = None,
        *,
        revision: str | None = None,
        **options: Any,
    ) -> "MicrogliaPruningSystem":
        """Load a checkpoint from a folder or the hub, with the model it names or the one given.

        options: tokenizer, dtype, device, quantize and trust_remote_code as for a new system.
        """
        saved = Checkpoint.from_pretrained(folder, revision=revision)
        config = saved.config
        if model is None and not config.base_model:
            raise CheckpointError(
                f"the checkpoint {folder} was made on a model in memory, which it cannot load; pass model="
            )
        system = cls(config.base_model if model is None else model, **options)
        system.model, system.pruner = saved.load_onto(system.model), saved.pruner
        system.pruner = system.pruner.with_costs(system.costs())
        system.template, system.training, system.promise = config.template, config.training, config.promise
        system._used = frozenset(config.used.split())
        return system

    def costs(self, *, batch: int = 1, context: int = CONTEXT) -> StepCosts:
        """Bytes of a decode step of so many rows with so many tokens behind them, unit by unit."""
        return step_costs(self.model, self.pruner.sites(self.model), batch=batch, context=context)

    def _setup(self, task: Task, examples: Any, execution: str | Execution, batch_size: int, longest: int) -> Setup:
        how = self._execution(execution)
        return Setup(self.model, self.tokenizer, task, examples, how, batch_size, longest)

    def _calibration(self, task: Task, examples: Sequence[Example], **changes: Any) -> Calibration:
        """Examples for a criterion that scores this system's units."""
        pruner = self.pruner
        rules = {"window": pruner.window, "bucket": pruner.gate.bucket, "fill": pruner.fill, "units": pruner.units}
        return Calibration(
            self.model, self.tokenizer, task, examples, **{**rules, "arrangement": pruner.arrangement, **changes}
        )

    def _calibrated(self, task: Task, examples: Sequence[Example], pruner: Pruner, config: TrainingConfig) -> Pruner:
        """The pruner with a budget from these examples, weighted by the tokens of the answers that were trained on."""
        setup = Setup(self.model, self.tokenizer, task, examples)
        if config.target != "model":
            return setup.calibrated(pruner)
        written = continued(causal_lm(self.model), self.tokenizer, task, examples, config)
        return setup.calibrated(pruner, [len(row["answer"]) for row in written])

    def _execution(self, execution: str | Execution) -> Execution:
        """One of each kind for the present model: what it captured serves all later requests."""
        if isinstance(execution, Execution):
            return execution
        if execution not in self._executions:
            lm = causal_lm(self.model)
            with nullcontext() if kind_of(execution).shares else attached_alone(lm):  # not of what a thread has cut
                self._executions[execution] = execution_for(execution, lm)
        return self._executions[execution]

    def _rendered(self, prompts: Sequence[str], raw: bool = False) -> list[str]:
        if empty := [index for index, prompt in enumerate(prompts) if not prompt.strip()]:
            raise DataError(f"prompt {empty[0]} of {len(prompts)} is empty; give every prompt some text")
        return list(prompts) if raw else [render_prompt(self.tokenizer, prompt, self.template) for prompt in prompts]


def _keep_ratios(keep: Sequence[Tensor], prompts: int) -> list[float]:
    """Share of kept heads per prompt; 1 when the model stayed dense."""
    return keep_ratio(keep).tolist() if keep else [1.0] * prompts
