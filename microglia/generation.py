"""Generate answers for prompts with any execution: dense, masked, compact, captured."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from microglia.anatomy import causal_lm, never_reread
from microglia.attach import Trace, pruning_itself
from microglia.errors import MicrogliaError
from microglia.execution import Execution, Prepared, Request, execution_for, kind_of
from microglia.lease import attached_alone, dense
from microglia.passes import read_prompt
from microglia.pruner import Pruner
from microglia.reading import encode_prompts
from microglia.settings import Settings, merged, without_defaults


@dataclass(frozen=True)
class Generated:
    """New tokens (B, N), their texts, and of every site the keep (B, U) and the signals, by name (B, U).

    lengths: new tokens per row, up to and with the one that ends the answer, without the padding after it. finished:
    whether one of them ended it, and not the limit of new tokens. Without a pruner there is neither keep nor signals.
    With several answers to a prompt (num_return_sequences) rows are answers, and those of keep and signals are prompts.
    """

    tokens: Tensor
    texts: list[str]
    lengths: list[int]
    finished: list[bool]
    keep: list[Tensor] = field(default_factory=list)
    signals: list[dict[str, Tensor]] = field(default_factory=list)


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    pruner: Pruner | None = None,
    *,
    execution: str | Execution = "compact",
    max_new_tokens: int | None = None,
    **options: Any,
) -> Generated:
    """Read `prompts` as one batch with every unit; write the answers with the units that `pruner` keeps for each.

    Without a pruner, or with the execution `dense`, the model stays dense. Others: `compact` (units are gone), `masked`
    (units are multiplied by zero; the same tokens, no time saved), `captured` (gone, and decode steps are captured, for
    GPUs; give an Execution of your own that you keep between calls, else everything is captured anew). max_new_tokens:
    256 unless a generation_config among the options says otherwise. `options` go to the model's own `generate`
    (sampling, streamer, stopping, beams, custom_generate, generation_config); greedy by default, whatever the model's
    own generation_config says. Raises DataError for an empty or too long prompt, ConfigError for options that do not go
    with pruning, MicrogliaError while another thread uses the model in a way that would mix the answers, or where an
    answer was not written as it was decided.
    """
    lm = causal_lm(model)
    pruner = pruner if kind_of(execution).prunes else None
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    settings = merged(lm, tokenizer, options, pruned=pruner is not None)
    batch = encode_prompts(lm, tokenizer, prompts, settings.new_tokens)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    # A cache of the caller's own would come back with tensors that nobody may write outside inference mode.
    mode = torch.no_grad() if "past_key_values" in options else torch.inference_mode()
    with mode, answering(lm, pruner, execution, settings, mask) as (trace, prepared, writer):
        if prepared.greedy is not None and settings.is_plain:
            first = read_prompt(lm, ids, mask, **prepared.cache_option)
            new = prepared.greedy(first.logits[:, -1])
        else:
            output = writer.generate(**batch, **prepared.cache_option, **settings.options)
            new = getattr(output, "sequences", output)[:, ids.shape[1] :]
    lengths = settings.lengths(new)
    answers = [row[:length] for row, length in zip(new, lengths, strict=True)]
    finished = [len(row) > 0 and int(row[-1]) in settings.end_tokens for row in answers]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    if trace is None:
        return Generated(new, texts, lengths, finished)
    rows = slice(None, None, max(1, len(trace.keep[0]) // len(ids)))  # beams of a prompt share its decision
    signals = [{name: x[rows] for name, x in site.items()} for site in trace.signals]
    return Generated(new, texts, lengths, finished, [k[rows] for k in trace.keep], signals)


@contextmanager
def answering(
    lm: Any, pruner: Pruner | None, execution: str | Execution, settings: Settings, mask: Tensor
) -> Iterator[tuple[Trace | None, Prepared, Any]]:
    """While inside, one request is read and answered, dense and without a trace where there is no pruner.

    Yields the trace, what the execution brings, and the model whose `generate` takes `settings.options`.
    mask: (B, T), false at padding. Leaving makes sure that the prompt was read once and its cache continued: raises
    MicrogliaError where it was not, so that no answer passes for a pruned one.
    """
    fill = pruner is not None and pruner.fill == "mean"
    request = Request(mask, settings.new_tokens, fill, settings.end_tokens, settings.config.pad_token_id)
    alone = pruner is not None or not kind_of(execution).shares
    with ExitStack() as stack:
        # First of all, as a refused caller must not touch what another thread uses, nor make anything of a cut model.
        stack.enter_context(attached_alone(lm) if alone else dense(lm))
        execution = execution_for(execution, lm)
        execution.check_generation(settings.config)
        trace = None if pruner is None else stack.enter_context(pruning_itself(lm, pruner, execution))
        if pruner is not None:
            never_reread(stack, lm, mask.shape[1], settings.new_tokens)
        prepared = stack.enter_context(execution.prepared(request))
        if prepared.cache is not None:
            settings.check_no_cache(execution.name)
        yield trace, prepared, without_defaults(lm)
    if trace is not None and trace.gaps:
        raise MicrogliaError(
            f"{trace.gaps} passes did not continue the cache where the one before had ended, so the answer is not that "
            "of its prompt's decision; in a custom_generate feed every new token once"
        )
    if trace is not None and trace.prompts != 1:
        raise MicrogliaError(
            f"the model read a whole text {trace.prompts} times, but a prompt is read once and continued by its cache, "
            "else nothing is pruned; in a custom_generate call model(...), not model.forward(...), and hand "
            "past_key_values on"
        )
