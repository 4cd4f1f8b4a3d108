"""lm-evaluation-harness on a microglia checkpoint: its tasks, prompts and scorers, with the pruned model's answers.

    python -m microglia.harness run --model microglia --tasks gsm8k,arc_challenge --batch_size 16 \\
        --model_args checkpoint=checkpoints,execution=compact,keep_ratio=0.75

is `lm_eval` with one more model; importing this module does the same for `lm_eval.simple_evaluate`. Needs the extra
`eval`. The context of a request is the prompt and is read with every head; continuations and generated texts are gated.
A continuation of one token, such as a letter, is predicted by the context alone and so by the dense model: judge those
by generation, or by the likelihood of whole texts.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from microglia.anatomy import causal_lm, swap
from microglia.errors import ConfigError, MicrogliaError
from microglia.evaluation.likelihood import likelihoods
from microglia.execution import execution_for
from microglia.generation import answering
from microglia.settings import merged
from microglia.system import MicrogliaPruningSystem

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MicrogliaError("lm-evaluation-harness is not installed; pip install 'microglia[eval]'") from error

NAME = "microglia"


@register_model(NAME)
class MicrogliaLM(HFLM):
    """A checkpoint as lm_eval's model; whatever is not said here is as in its own model `hf`.

    checkpoint: folder or hub id, or a system in memory. execution: compact, captured, masked or dense. keep_ratio: see
    `set_keep_ratio`. base_model: instead of the one that the checkpoint names. options: those of `hf` that do not load
    a model, such as max_length or add_bos_token.
    """

    def __init__(
        self,
        checkpoint: str | MicrogliaPruningSystem,
        execution: str = "compact",
        keep_ratio: float | None = None,
        base_model: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r} was given; give a number, as automatic sizes are for hf only")
        if isinstance(checkpoint, MicrogliaPruningSystem):
            system = checkpoint
        else:
            loading = {name: options.pop(name) for name in ("device", "dtype", "trust_remote_code") if name in options}
            system = MicrogliaPruningSystem.from_pretrained(checkpoint, base_model, **loading)
        self.execution = execution_for(execution, system.model)
        self.pruner = system.pruner.at(keep_ratio) if self.execution.prunes else None
        self.keep_ratios: list[float] = []
        super().__init__(
            pretrained=causal_lm(system.model), tokenizer=system.tokenizer, batch_size=int(batch_size), **options
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Requests are (texts, context ids, continuation ids); contexts that are too long lose their beginning."""
        pairs = []
        for _, context, continuation in requests:
            space = max(self.max_length + 1 - len(continuation), 1)
            pairs.append((list(context[-space:]), list(continuation)))
        scored = likelihoods(
            self.model,
            pairs,
            self.pruner,
            execution=self.execution,
            batch_size=override_bs or self.batch_size,
        )
        self.keep_ratios += [one.keep_ratio for one in scored]
        answers = [(one.log_probability, one.greedy) for one in scored]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Only dense: a text without a prompt gives nothing to decide on."""
        if self.pruner is not None:
            raise ConfigError(
                "a perplexity task scores texts without a prompt, so there is nothing to decide on which heads to "
                "keep; leave such tasks out or give execution=dense"
            )
        return list(super().loglikelihood_rolling(requests, disable_tqdm))

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        mask = options.get("attention_mask")
        mask = torch.ones_like(context) if mask is None else mask
        given: dict[str, Any] = {"max_new_tokens": max_length - context.shape[1]}
        given |= {name: options[name] for name in ("num_beams", "num_return_sequences") if name in options}
        settings = merged(self.model, self.tokenizer, given, pruned=self.pruner is not None)
        options.setdefault("eos_token_id", settings.config.eos_token_id)
        with (
            answering(self.model, self.pruner, self.execution, settings, mask) as (trace, prepared, writer),
            ExitStack() as stack,
        ):
            swap(stack, self, "_model", writer)
            tokens = super()._model_generate(context, max_length, stop, **options, **prepared.cache_option)
        self.keep_ratios += [1.0] * len(context) if trace is None else trace.keep_ratio.tolist()
        return tokens

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside its results: also the execution and the mean share of heads pruned."""
        ratios = self.keep_ratios or [1.0]
        return {
            **super().get_model_info(),
            "microglia_execution": self.execution.name,
            "microglia_sparsity": 1 - sum(ratios) / len(ratios),
        }


def main() -> None:
    """lm_eval's own command line, which now knows the model `microglia`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
