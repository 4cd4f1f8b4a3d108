"""lm-evaluation-harness on a microglia checkpoint: its tasks, prompts and scorers, with the pruned model's answers.

    python -m microglia.harness run --model microglia --tasks gsm8k,arc_challenge --batch_size 16 \\
        --model_args checkpoint=checkpoints,path=compact,keep_ratio=0.75

is `lm_eval` with one more model; importing this module does the same for `lm_eval.simple_evaluate`. Needs the extra
`eval`. The context of a request is the prompt and is read with every head; continuations and generated texts are gated.
A continuation of one token, such as a letter, is predicted by the context alone and so by the dense model: judge those
by generation, or by the likelihood of whole texts.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from microglia.attach import Trace, attached
from microglia.errors import ConfigError, MicrogliaError
from microglia.evaluation.likelihood import Likelihood, likelihoods
from microglia.gate import keep_ratio as kept
from microglia.generation import PATHS
from microglia.sites import causal_lm
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

    checkpoint: folder or hub id, or a system in memory. path: compact, masked or dense. keep_ratio: see
    `set_keep_ratio`. base_model: instead of the one that the checkpoint names. options: those of `hf` that do not load
    a model, such as max_length or add_bos_token.
    """

    def __init__(
        self,
        checkpoint: str | MicrogliaPruningSystem,
        path: str = "compact",
        keep_ratio: float | None = None,
        base_model: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        if path not in (*PATHS, "dense"):
            raise ConfigError(f"path={path!r} is unknown; choose {', '.join(PATHS)} or dense")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r} was given; give a number, as automatic sizes are for hf only")
        if isinstance(checkpoint, MicrogliaPruningSystem):
            system = checkpoint
        else:
            system = MicrogliaPruningSystem.from_pretrained(
                checkpoint, base_model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
            )
        self.system, self.path = system, path
        self.pruning_gate = system.gate if keep_ratio is None else system.gate_for(keep_ratio)
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
            room = max(self.max_length + 1 - len(continuation), 1)
            pairs.append((list(context[-room:]), list(continuation)))
        system, dense = self.system, self.path == "dense"
        found: list[Likelihood] = likelihoods(
            self.model,
            pairs,
            None if dense else system.policy,
            pad_token_id=self.tokenizer.pad_token_id,
            gate=self.pruning_gate,
            look=system.look,
            fill=system.fill,
            scope=system.scope,
            path="masked" if dense else self.path,
            batch_size=override_bs or self.batch_size,
        )
        self.keep_ratios += [one.keep_ratio for one in found]
        answers = [(one.log_probability, one.greedy) for one in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Only dense: a text without a prompt gives nothing to decide on."""
        if self.path != "dense":
            raise ConfigError(
                "a perplexity task scores texts without a prompt, so there is nothing to decide on which heads to "
                "keep; leave such tasks out or give path=dense"
            )
        return list(super().loglikelihood_rolling(requests, disable_tqdm))

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        with self._attached() as trace:
            tokens = super()._model_generate(context, max_length, stop, **options)
        self.keep_ratios += kept(trace.keep).tolist() if trace else [1.0] * len(context)
        return tokens

    def _attached(self) -> AbstractContextManager[Trace | None]:
        system = self.system
        if self.path == "dense":
            return nullcontext()
        return attached(
            self.model,
            system.policy,
            gate=self.pruning_gate,
            look=system.look,
            fill=system.fill,
            scope=system.scope,
            pruning=PATHS[self.path],
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside its results: also the path and the share of heads pruned, mean over requests."""
        ratios = self.keep_ratios or [1.0]
        return {
            **super().get_model_info(),
            "microglia_path": self.path,
            "microglia_sparsity": 1 - sum(ratios) / len(ratios),
        }


def main() -> None:
    """lm_eval's own command line, which now knows the model `microglia`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
