"""MicrogliaPruningSystem: a pruned model's whole life behind one object. Thin: each step is done by its own module."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia import processes
from microglia.checkpoint import Checkpoint, MicrogliaConfig, check_writable
from microglia.decision import Decision, decide
from microglia.errors import CheckpointError, ConfigError, DataError, MicrogliaError
from microglia.evaluation.bench import Bench
from microglia.evaluation.choices import score_choices
from microglia.evaluation.run import evaluate, paired
from microglia.experiments.calibrate import calibrate, unused_examples
from microglia.experiments.ledger import Ledger
from microglia.gate import Gate, check_bucket, keep_ratio, threshold_for
from microglia.generation import generate, prompt_logits
from microglia.look import Look
from microglia.models import REASONER, load_model
from microglia.policy import Policy, new_agents
from microglia.replay import GraphDecoder
from microglia.results import EvaluationResult, Promise
from microglia.sites import causal_lm, check_head_count, find_sites, input_device
from microglia.tasks import Task, get_task
from microglia.tasks.prompts import example_prompt, render_prompt
from microglia.training import TrainingConfig, TrainingResult, train

CALIBRATION_PROMPTS = 64  # kept in the checkpoint as logits; the dial's keep ratio is a mean over them
AT_ONCE = 32  # prompts per batch


class MicrogliaPruningSystem:
    """A causal LM, the policy that prunes it, and how it looks, gates and fills.

    model: hub id, local folder, module in memory (then pass tokenizer) or `reasoner`, which ships with the package.
    num_heads: checked against the model; None takes the model's. policy: `agents` (an MLP per site) or `mixture` (masks
        that every prompt mixes, docs/recipe.md). hidden_dim: of an MLP, or the number of masks; None is 128 and 16.
    features: both, norm or entropy.
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
        features: str = "both",
        look: Look | None = None,
        bucket: int | None = None,
        fill: str = "zero",
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        quantize: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.model: nn.Module
        self.model, self.tokenizer = load_model(
            model,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
        )
        self.source = None if isinstance(model, nn.Module) else str(model)
        self.sites = find_sites(self.model)
        check_head_count(self.sites, num_heads)
        check_bucket(bucket, [site.geometry for site in self.sites])
        self.look, self.gate = look or Look(), Gate(bucket=bucket)
        self.fill, self.scope, self.template = fill, "answer", Task.template
        self.training: dict[str, Any] = {}
        self.promise: dict[str, Any] = {}
        self.calibration: Sequence[Tensor] = ()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            agents = new_agents(policy, [s.geometry for s in self.sites], hidden_dim=hidden_dim, features=features)
        self.policy: Policy = agents.to(self._device).eval()
        self._keep_ratios: list[float] = []
        self._decoder: GraphDecoder | None = None

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
        options = {"fill": self.fill, **options, **{name: value for name, value in given.items() if value is not None}}
        config = _training_config(options)
        if output_dir is not None:
            check_writable(output_dir)
        with tempfile.TemporaryDirectory() if output_dir is None else nullcontext(str(output_dir)) as folder:
            result = train(
                self.model,
                self.tokenizer,
                task,
                self.policy,
                config,
                output_dir=folder,
                look=self.look,
                bucket=self.gate.bucket,
                data_dir=data_dir,
                resume=resume,
                quiet=quiet,
                on_log=on_log,
            )
        self.model, self.policy = result.model, result.policy
        self.fill, self.scope, self.template = config.fill, config.scope, task.template
        self.gate, self.promise = replace(self.gate, threshold=0.0), {}
        held_out = task.load("validation", limit=CALIBRATION_PROMPTS, seed=config.seed, data_dir=data_dir)
        self.calibration = self._prompt_logits([example_prompt(self.tokenizer, e, task.template) for e in held_out])
        last = {name: value for row in result.history for name, value in row.items() if isinstance(value, int | float)}
        self.training = {"dataset": task.name, "seconds": result.seconds, "last": last, "config": asdict(config)}
        if output_dir is not None and processes.is_first():
            self.save_pretrained(output_dir)
        processes.wait()
        return result

    @overload
    def generate(self, prompt: str, max_new_tokens: int = ..., **options: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], max_new_tokens: int = ..., **options: Any) -> list[str]: ...
    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 256,
        *,
        path: str = "compact",
        keep_ratio: float | None = None,
        raw: bool = False,
        **options: Any,
    ) -> str | list[str]:
        """The answer to a question, or the answers to several; each is written with its own heads.

        path: compact (heads are gone), masked (the same answer, no time saved), graph (compact, with captured steps,
            for GPUs) or dense (no pruning).
        keep_ratio: this time only, see `set_keep_ratio`. raw: the prompt is complete and gets no template.
        options: of the model's own `generate` (sampling, streamer, stopping); greedy by default.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise DataError("no prompt was given; give at least one")
        texts, ratios = [], []
        for start in range(0, len(prompts), AT_ONCE):
            output = generate(
                self.model,
                self.tokenizer,
                self._rendered(prompts[start : start + AT_ONCE], raw),
                None if path == "dense" else self.policy,
                gate=self.gate_for(keep_ratio),
                look=self.look,
                fill=self.fill,
                scope=self.scope,
                path="masked" if path == "dense" else path,
                decoder=self._captured() if path == "graph" else None,
                max_new_tokens=max_new_tokens,
                **options,
            )
            texts += [text.strip() for text in output.texts]
            ratios += _keep_ratios(output.keep, len(output.texts))
        self._keep_ratios = ratios
        return texts[0] if isinstance(prompt, str) else texts

    def _captured(self) -> GraphDecoder:
        """The decoder of the present model; what it captured serves all later requests."""
        if self._decoder is None or self._decoder.parts.lm is not causal_lm(self.model):
            self._decoder = GraphDecoder(self.model)
        return self._decoder

    def decide(self, prompt: str, *, keep_ratio: float | None = None, raw: bool = False) -> Decision:
        """Which heads a prompt keeps and why, head by head; nothing is generated. keep_ratio, raw: see `generate`."""
        gate, (rendered,) = self.gate_for(keep_ratio), self._rendered([prompt], raw)
        return decide(self.model, self.tokenizer, rendered, self.policy, gate=gate, look=self.look, scope=self.scope)

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
        path: str = "compact",
        keep_ratio: float | None = None,
        batch_size: int = AT_ONCE,
        max_new_tokens: int = 256,
        dense: bool = True,
        scoring: str = "generation",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> EvaluationResult:
        """Exact match and sparsity on a task, pruned and (unless dense=False) dense on the same prompts.

        scoring: generation, or for multiple choice likelihood or likelihood-per-character, see `score_choices`.
        With LoRA, dense has the adapter too. `progress(name, done, total)` is called after every batch.
        """
        task = get_task(dataset_name)
        examples = task.load(split, limit=limit, seed=seed, data_dir=data_dir)
        judge = evaluate if scoring == "generation" else score_choices
        how = {"max_new_tokens": max_new_tokens} if scoring == "generation" else {"scoring": scoring}
        runs = {}
        for name, policy in {"pruned": self.policy, **({"dense": None} if dense else {})}.items():
            runs[name] = judge(
                self.model,
                self.tokenizer,
                task,
                examples,
                policy,
                gate=self.gate_for(keep_ratio),
                look=self.look,
                fill=self.fill,
                scope=self.scope,
                path=path,
                batch_size=batch_size,
                **how,
                progress=(lambda done, total, name=name: progress(name, done, total)) if progress else None,  # type: ignore[misc]
            )
        pruned = runs["pruned"]
        self._keep_ratios = [answer.keep_ratio for answer in pruned.answers]
        return EvaluationResult(
            dataset=task.name,
            split=split,
            shots=task.shots,
            scoring=scoring,
            accuracy=pruned.accuracy,
            sparsity=pruned.sparsity,
            **{name: run.summary() for name, run in runs.items()},  # type: ignore[arg-type]
            paired=paired(runs["dense"], pruned) if dense else None,
            answers={name: run.rows() for name, run in runs.items()},
        )

    def set_keep_ratio(self, ratio: float | None, prompts: Sequence[str] | None = None) -> float:
        """Turn the dial: from now on so many heads are kept on average; prompts still differ. Returns the threshold.

        prompts: questions to calibrate on; without them the held-out ones of the training are used, whose decisions the
        checkpoint holds. None as ratio goes back to the trained decision.
        """
        if prompts is not None:
            self.calibration = self._logits(list(prompts))
        self.gate = replace(self.gate, threshold=0.0) if ratio is None else self.gate_for(ratio)
        self.promise = {}  # was for another threshold
        return self.gate.threshold

    def calibrate(
        self,
        dataset_name: str = "arithmetic",
        *,
        split: str = "validation",
        limit: int | None = None,
        seed: int = 0,
        data_dir: Path | str | None = None,
        path: str = "compact",
        batch_size: int = AT_ONCE,
        max_new_tokens: int = 256,
        ledger: Path | str | None = None,
        **aim: Any,
    ) -> Promise:
        """Prune as far as a promise allows, on held-out prompts that training did not use.

        aim: options of `experiments.calibrate.calibrate`: max_drop with confidence, or keep_ratio, or latency_ratio.
        ledger: a file that remembers the answers, so that an interrupted calibration goes on.
        """
        task = get_task(dataset_name)
        trained = self.training.get("config", {}) if self.training.get("dataset") == dataset_name else None
        examples = unused_examples(task, split, trained, CALIBRATION_PROMPTS, limit=limit, seed=seed, data_dir=data_dir)
        bench = Bench(self.model, self.tokenizer, task, examples, self.look, self.fill, self.scope, path)
        bench = replace(bench, batch_size=batch_size, max_new_tokens=max_new_tokens)
        settings: dict[str, Any] = {"dataset": dataset_name, "split": split, "limit": limit, "seed": seed, "path": path}
        about = {**settings, "max_new_tokens": max_new_tokens, "base_model": self.source, "fill": self.fill}
        about |= {"scope": self.scope, "look": asdict(self.look), "policy": self.policy.fingerprint()}
        promise = calibrate(bench, self.policy, self.gate_for, ledger=Ledger(ledger, about), **aim)
        promise = replace(promise, settings=settings)
        self.gate = replace(self.gate, threshold=promise.threshold)
        self.promise = promise.to_json()
        return promise

    def gate_for(self, ratio: float | None) -> Gate:
        """The gate, with the threshold for a keep ratio if one is given; see `set_keep_ratio`."""
        if ratio is None:
            return self.gate
        if not len(self.calibration):
            raise ConfigError(
                f"keep_ratio={ratio} was given, but there are no prompts to calibrate it on; train first or give "
                "set_keep_ratio some"
            )
        geometries = [site.geometry for site in self.sites]
        return replace(self.gate, threshold=threshold_for(self.calibration, geometries, ratio, self.gate.bucket))

    def checkpoint(self) -> Checkpoint:
        """What `save_pretrained` writes, as a value (for `push_to_hub`, say)."""
        config = MicrogliaConfig.describing(
            self.model,
            self.policy,
            base_model=self.source,
            gate=self.gate,
            look=self.look,
            fill=self.fill,
            scope=self.scope,
            template=self.template,
            training=self.training,
            promise=self.promise,
        )
        return Checkpoint(self.policy, config, self.calibration)

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write policy, configuration, model card and, with LoRA, the adapter; not the base model."""
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
        system = cls(config.base_model if model is None else model, look=config.look, fill=config.fill, **options)
        system.model = saved.load_onto(system.model)
        system.policy, system.gate, system.calibration = saved.policy, config.gate, saved.calibration
        system.scope, system.template, system.training = config.scope, config.template, config.training
        system.promise = config.promise
        return system

    @property
    def _device(self) -> torch.device:
        return input_device(self.model)

    def _rendered(self, prompts: Sequence[str], raw: bool = False) -> list[str]:
        if empty := [index for index, prompt in enumerate(prompts) if not prompt.strip()]:
            raise DataError(f"prompt {empty[0]} of {len(prompts)} is empty; give every prompt some text")
        return list(prompts) if raw else [render_prompt(self.tokenizer, prompt, self.template) for prompt in prompts]

    def _logits(self, questions: Sequence[str]) -> list[Tensor]:
        """The policy's logits (N, H) per site for N questions."""
        return self._prompt_logits(self._rendered(questions))

    def _prompt_logits(self, prompts: Sequence[str]) -> list[Tensor]:
        return prompt_logits(self.model, self.tokenizer, prompts, self.policy, look=self.look)


def _keep_ratios(keep: Sequence[Tensor], prompts: int) -> list[float]:
    """Share of kept heads per prompt; 1 when the model stayed dense."""
    return keep_ratio(keep).tolist() if keep else [1.0] * prompts


def _training_config(options: dict[str, Any]) -> TrainingConfig:
    known = [f.name for f in fields(TrainingConfig)]
    if unknown := sorted(options.keys() - set(known)):
        raise ConfigError(f"training has no option {', '.join(unknown)}; choose from {', '.join(known)}")
    return TrainingConfig(**options)
