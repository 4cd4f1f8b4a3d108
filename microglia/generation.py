"""Generate answers for prompts with any execution: dense, masked, compact, captured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.anatomy import causal_lm
from microglia.attach import Trace, attached
from microglia.errors import ConfigError, MicrogliaError
from microglia.execution import Execution, Prepared, Request, execution_for
from microglia.lease import dense
from microglia.passes import read_prompt
from microglia.pruner import Pruner
from microglia.reading import encode_prompts

# Settings that a loop of greedy steps follows, and those that say nothing once sampling is off.
FOLLOWED = {"pad_token_id", "eos_token_id", "bos_token_id", "use_cache"}
SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "max_length", "transformers_version", "_from_model_config"}
IN_PARTS = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


@dataclass(frozen=True)
class Generated:
    """New tokens (B, N), their texts, and of every site the keep (B, U) and the signals, by name (B, U).

    Without a pruner there is neither keep nor signals.
    """

    tokens: Tensor
    texts: list[str]
    keep: list[Tensor]
    signals: list[dict[str, Tensor]] = field(default_factory=list)

    def lengths(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """New tokens per row, up to and with the end-of-text token, without the padding after it."""
        ended = (self.tokens == tokenizer.eos_token_id).long().cumsum(1)
        before = (ended == 0).sum(1)
        lengths: list[int] = (before + (ended > 0).any(1)).tolist()
        return lengths


@dataclass(frozen=True)
class Settings:
    """What the caller and the model want of a generation, merged once: `options` go to the model's own `generate`."""

    options: dict[str, Any]
    model_defaults: dict[str, Any]

    @classmethod
    def merged(cls, lm: Any, tokenizer: PreTrainedTokenizerBase, given: dict[str, Any], *, pruned: bool) -> "Settings":
        """The caller's over ours over the model's. Raises ConfigError for what pruning cannot be combined with."""
        defaults = {k: v for k, v in lm.generation_config.to_diff_dict().items() if v is not None and v is not False}
        settings = cls({"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **given}, defaults)
        if not pruned:
            return settings
        for name in IN_PARTS:
            if settings.given(name):
                raise ConfigError(
                    f"{name} reads the prompt in parts or with guesses, so nothing could be decided on it; leave it out"
                )
        if settings.given("use_cache") is False:
            raise ConfigError(
                "use_cache=False reads the prompt again for every token, so nothing is ever pruned; leave it out"
            )
        # Whatever the model's own configuration says: without a cache nothing is ever pruned.
        return cls({**settings.options, "use_cache": True}, defaults)

    def given(self, name: str) -> Any:
        """What the caller said of an option: by itself, or in a generation_config of their own."""
        return self.options.get(name, getattr(self.options.get("generation_config"), name, None))

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ends = self.options.get("eos_token_id", self.model_defaults.get("eos_token_id"))
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def is_plain(self) -> bool:
        """Whether an answer is the likeliest token after token, and nothing else was asked for."""
        given = {name: value for name, value in self.options.items() if value is not None}
        greedy = given.pop("do_sample") is False
        return greedy and given.keys() <= FOLLOWED and self.model_defaults.keys() <= FOLLOWED | SAMPLING


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    pruner: Pruner | None = None,
    *,
    execution: str | Execution = "compact",
    max_new_tokens: int = 256,
    **options: Any,
) -> Generated:
    """Read `prompts` as one batch with every unit; write the answers with the units that `pruner` keeps for each.

    Without a pruner, or with the execution `dense`, the model stays dense. Others: `compact` (units are gone), `masked`
    (units are multiplied by zero; the same tokens, no time saved), `captured` (gone, and decode steps are captured, for
    GPUs; give an Execution of your own that you keep between calls, else everything is captured anew). `options` go to
    the model's own `generate` (sampling, streamer, stopping, beams, custom_generate); greedy by default. Raises
    DataError for an empty or too long prompt, MicrogliaError while another thread uses the model in a way that would
    mix the answers.
    """
    lm = causal_lm(model)
    execution = execution_for(execution, lm)
    pruner = pruner if execution.prunes else None
    settings = Settings.merged(lm, tokenizer, options, pruned=pruner is not None)
    execution.check_generation({name: settings.given(name) for name in ("num_beams", "num_return_sequences")})
    batch = encode_prompts(lm, tokenizer, prompts, max_new_tokens)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pad = settings.options["pad_token_id"]
    request = Request(
        mask,
        max_new_tokens,
        fill=pruner is not None and pruner.fill == "mean",
        end_tokens=settings.end_tokens,
        pad_token=0 if pad is None else pad,
    )
    with answering(lm, pruner, execution, request) as (trace, prepared):
        if prepared.greedy is not None and settings.is_plain:
            first = read_prompt(lm, ids, mask, **prepared.cache_option)
            new = prepared.greedy(first.logits[:, -1])
        else:
            output = lm.generate(**batch, **prepared.cache_option, max_new_tokens=max_new_tokens, **settings.options)
            new = getattr(output, "sequences", output)[:, ids.shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    if pruner is None or trace is None:
        return Generated(new, texts, [])
    _check_read_once(trace, settings)
    return Generated(new, texts, trace.keep, trace.signals)


@contextmanager
def answering(
    lm: Any, pruner: Pruner | None, execution: Execution, request: Request
) -> Iterator[tuple[Trace | None, Prepared]]:
    """While inside, the model reads and answers one request, dense and without a trace where there is no pruner."""
    with (  # in this order: a caller who is refused must not have touched what another thread captured and uses
        attached(lm, pruner, execution) if pruner is not None else dense(lm) as trace,
        execution.prepared(request) as prepared,
    ):
        yield trace, prepared


def _check_read_once(trace: Trace, settings: Settings) -> None:
    if trace.prompts != 1 and settings.options.get("custom_generate") is not None:
        raise MicrogliaError(
            f"custom_generate read a whole text {trace.prompts} times, but a prompt is read once and continued by its "
            "cache, else nothing is pruned; call model(...), not model.forward(...), and hand past_key_values on"
        )
