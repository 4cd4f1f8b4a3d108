"""How close a pruned model stays to the dense one on given texts: KL and top-1 agreement per token, log-likelihood.

The text is fed as it is (teacher forcing): the prompt is read dense, the text continues it once dense and once pruned,
and both distributions are compared token by token. As in generation the prompt predicts the first token of the text,
dense whatever is pruned, so that token says nothing and is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.anatomy import causal_lm, context_length, input_device, token_rows
from microglia.errors import DataError
from microglia.evaluation.batches import Progress, by_batches
from microglia.evaluation.likelihood import Pair
from microglia.execution import Execution, execution_for
from microglia.ledger import Ledger
from microglia.passes import answer_logits, batch_of, read_prompt, write_answer
from microglia.pruner import Pruner
from microglia.tasks.used import fingerprint_of

MOST_LOGITS = 2**27  # of one batch, in the model's own type: 256 MB in 16 bit, twice, as dense and pruned meet
AT_ONCE = 64  # positions that are compared at a time, in float32


@dataclass(frozen=True)
class Closeness:
    """Of one text, sums over the tokens that pruned units predict, which are all but the first.

    kl: Σ KL(dense ‖ pruned) in nats. agreed: tokens whose likeliest candidate is the same. dense_loss, pruned_loss:
    Σ −log p of the text itself. keep_ratio: what its prompt kept.
    """

    tokens: int
    kl: float
    agreed: int
    dense_loss: float
    pruned_loss: float
    keep_ratio: float

    @property
    def disagreement(self) -> float:
        """Share of the tokens whose likeliest candidate is another, in [0, 1]; 0 where there is none to compare."""
        return 1 - self.agreed / self.tokens if self.tokens else 0.0

    @property
    def mean_kl(self) -> float:
        """Nats per token; 0 where there is none to compare."""
        return self.kl / self.tokens if self.tokens else 0.0


@torch.inference_mode()
def closeness(
    model: nn.Module,
    pairs: Sequence[Pair],
    pruner: Pruner,
    *,
    execution: str | Execution = "compact",
    batch_size: int = 32,
    progress: Progress | None = None,
    ledger: Ledger | None = None,
) -> list[Closeness]:
    """How close the pruned model stays on the text of every pair, after its prompt; in the order of the pairs.

    An execution that scores no texts (captured) stands for what it writes: its tokens are those of compact. ledger:
    keeps finished batches; its settings name the model. Raises DataError for a pair that exceeds the model's context.
    `progress(done, total)` is called after every batch.
    """
    lm, context = causal_lm(model), context_length(model)
    execution = execution_for(execution, lm)
    if not execution.scores:
        execution = execution_for("compact", lm)
    longest = max((len(prompt) + len(text) - 1 for prompt, text in pairs), default=0)
    if context is not None and longest > context:
        raise DataError(
            f"a prompt and its text have {longest} tokens, but the model's context is {context}; give shorter ones"
        )
    batches = bounded_batches([(len(p), len(t)) for p, t in pairs], batch_size, MOST_LOGITS // token_rows(lm))

    def compared(rows: list[int]) -> dict[str, Any]:
        batch = batch_of([{"prompt": pairs[i][0], "answer": pairs[i][1]} for i in rows], input_device(lm))
        dense = write_answer(lm, batch, read_prompt(lm, batch.prompt, batch.prompt_mask))
        if execution.prunes:
            pruned, trace = answer_logits(lm, batch, pruner, execution)
            ratios = trace.keep_ratio.tolist()
        else:
            pruned, ratios = dense, [1.0] * len(rows)
        found = []
        for row, i in enumerate(rows):
            inside = slice(1, len(pairs[i][1]))
            found.append([*_compared(dense[row, inside], pruned[row, inside], batch.answer[row, inside]), ratios[row]])
        return {"closeness": found}

    if ledger is not None:
        who = {"pruner": pruner.fingerprint(), "execution": execution.name}
        ledger = ledger.within(**who, texts=fingerprint_of(pairs), part="closeness")
    by_pair = dict[int, Closeness]()
    for rows, part in zip(batches, by_batches(batches, compared, ledger, progress), strict=True):
        by_pair |= zip(rows, (Closeness(*one) for one in part["closeness"]), strict=True)
    return [by_pair[i] for i in range(len(pairs))]


def bounded_batches(lengths: Sequence[tuple[int, int]], batch_size: int, most: int) -> list[list[int]]:
    """Row numbers by (text, prompt) length, in batches of at most `batch_size` rows and `most` padded text tokens.

    A row that is longer than that by itself is a batch of its own.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (lengths[i][1], lengths[i][0])):
        full = not batches or len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * lengths[row][1] > most
        if full:
            batches.append([])
        batches[-1].append(row)
    return batches


def _compared(dense: Tensor, pruned: Tensor, ids: Tensor) -> list[float]:
    """Logits (N, V) twice and the text's tokens (N,) → number, KL, agreements and both losses, summed."""
    kl = agreed = dense_loss = pruned_loss = 0.0
    for start in range(0, len(ids), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        p, q = dense[part].float().log_softmax(-1), pruned[part].float().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        dense_loss -= float(p.gather(1, ids[part, None]).sum(dtype=torch.float64))
        pruned_loss -= float(q.gather(1, ids[part, None]).sum(dtype=torch.float64))
    return [len(ids), kl, agreed, dense_loss, pruned_loss]
