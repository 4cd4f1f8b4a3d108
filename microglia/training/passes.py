"""Forward passes of training, made exactly as inference makes them: the prompt dense, the answer with kept heads."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from microglia.attach import Trace, attached, gated
from microglia.gate import Gate
from microglia.generation import positions
from microglia.look import Look
from microglia.policy import Policy
from microglia.sites import find_sites
from microglia.training.data import Batch


def answer_logits(
    lm: nn.Module,
    batch: Batch,
    policy: Policy | None,
    *,
    gate: Gate,
    look: Look,
    fill: str = "zero",
    scope: str = "answer",
    whole: ExitStack | None = None,
) -> tuple[Tensor, Trace]:
    """Logits (B, N, V) that predict the answer's tokens, and the trace of the decision (empty without a policy).

    By default in two passes: the prompt fills a cache, the answer continues it, gated. The prompt pass needs no
    gradient unless the model itself is trained. With `whole`, prompt and answer go through one pass with gates on
    answer positions instead: the same numbers at about twice the cost, for gradient checkpointing, which cannot use a
    cache and runs the layers again in the backward pass: the gates stay until the caller closes `whole`.
    """
    if policy is None:
        return _one_pass(lm, batch), Trace()
    if scope == "all":
        prompt = torch.cat([batch.prompt_mask, torch.zeros_like(batch.answer_mask[:, :-1])], 1).bool()
        with attached(lm, policy, gate=gate, look=look, scope="all", tokens=prompt) as trace:
            return _one_pass(lm, batch), trace
    if whole is not None:
        with attached(lm, policy, gate=gate, look=look, pruning=_decided_only) as trace, torch.no_grad():
            read_prompt(lm, batch, use_cache=False)
        where = torch.cat([torch.zeros_like(batch.prompt_mask), batch.answer_mask[:, :-1]], 1).bool()
        whole.enter_context(gated(find_sites(lm), trace.keep, where=where))
        return _one_pass(lm, batch), trace
    model_trains = any(p.requires_grad for p in lm.parameters())
    with attached(lm, policy, gate=gate, look=look, fill=fill) as trace:
        with torch.set_grad_enabled(model_trains and torch.is_grad_enabled()):
            first = read_prompt(lm, batch)
        return write_answer(lm, batch, first), trace


def prompt_features(lm: nn.Module, batch: Batch, policy: Policy, look: Look) -> list[Tensor]:
    """Features (B, F) of every site for the batch's prompts."""
    with attached(lm, policy, look=look, pruning=_decided_only) as trace, torch.no_grad():
        read_prompt(lm, batch)
    return trace.features


def read_prompt(lm: nn.Module, batch: Batch, *, use_cache: bool = True) -> Any:
    """The model's output for the batch's prompts: the last position's logits (B, 1, V) and the cache."""
    return lm(
        input_ids=batch.prompt,
        attention_mask=batch.prompt_mask,
        position_ids=positions(batch.prompt_mask),
        use_cache=use_cache,
        logits_to_keep=1,
    )


def write_answer(lm: nn.Module, batch: Batch, first: Any) -> Tensor:
    """Logits (B, N, V) that predict the answer's tokens, from the cache of `first`, what the prompts gave."""
    mask = torch.cat([batch.prompt_mask, batch.answer_mask[:, :-1]], 1)
    output = lm(
        input_ids=batch.answer[:, :-1],
        attention_mask=mask,
        position_ids=positions(mask)[:, batch.prompt.shape[1] :],
        past_key_values=first.past_key_values,
        use_cache=True,
    )
    return torch.cat([first.logits, output.logits], 1)


def _one_pass(lm: nn.Module, batch: Batch) -> Tensor:
    mask = torch.cat([batch.prompt_mask, batch.answer_mask[:, :-1]], 1)
    ids = torch.cat([batch.prompt, batch.answer[:, :-1]], 1)
    length = batch.answer.shape[1]
    output = lm(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=length
    )
    return output.logits


@contextmanager
def _decided_only(sites: Sequence[Any], keep: Sequence[Tensor], **_: Any) -> Iterator[None]:
    yield
