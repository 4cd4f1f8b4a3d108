"""Small calibrations: a tiny model of a family, four short questions with answers, characters for tokens."""

from typing import ClassVar

import torch

from microglia.criteria import Calibration
from microglia.tasks.base import Example, Task
from microglia.units import Arrangement
from tests.tiny import positions, tiny_model
from tests.tiny_folder import character_tokenizer

LAYOUTS = ("llama", "qwen2", "phi3", "gpt2")  # separate, grouped, fused with groups, Conv1D
PAIRS = (("1 plus 2?", "1+2=3"), ("What is 40 plus 2?", "42"), ("9-8?", "9-8=1"), ("2 times 3?", "2*3=6, so 6"))
EXAMPLES = [Example(str(i), question, answer, "0", 1) for i, (question, answer) in enumerate(PAIRS)]


class Sums(Task):
    name: ClassVar[str] = "sums"
    template: ClassVar[str] = "{question}"
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "test")

    def read(self, split, data_dir):
        return EXAMPLES


def calibration(
    family="llama", *, dtype=torch.float32, examples=EXAMPLES, units=("head",), arrangement=None, **changes
):
    how = {name: changes.pop(name, usual) for name, usual in {"batch_size": 4, "seed": 0}.items()}
    tokenizer = character_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer), dtype=dtype, **changes)
    how |= {"units": tuple(units), "arrangement": arrangement or Arrangement()}
    return Calibration(model, tokenizer, Sums(), examples, **how)


def one_pass_losses(cal, keep, batch=None):
    """Loss of each row (B,) from one pass over prompt and answer, gates at answer positions, hooks written here.

    `keep` (H,) or (B, H) per site.
    """
    batch = batch or cal.batches[0]
    start = batch.prompt.shape[1]

    def hook(geometry, k):
        def gate(_, inputs):
            heads = inputs[0].unflatten(-1, (geometry.heads, -1))
            k_rows = (k if k.dim() == 2 else k[None]).to(heads)
            gated = heads[:, start:] * k_rows[:, None, :, None]
            return (torch.cat([heads[:, :start], gated], 1).flatten(-2),)

        return gate

    handles = [s.output.register_forward_pre_hook(hook(s.geometry, k)) for s, k in zip(cal.sites, keep, strict=True)]
    mask = torch.cat([batch.prompt_mask, batch.answer_mask[:, :-1]], 1)
    ids = torch.cat([batch.prompt, batch.answer[:, :-1]], 1)
    logits = cal.lm(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    logits = logits[:, start - 1 :].log_softmax(-1)
    for handle in handles:
        handle.remove()
    losses = []
    for row, labels in zip(logits, batch.labels, strict=True):
        counted = labels != -100
        losses.append(-row[counted].gather(1, labels[counted][:, None]).mean())
    return torch.stack(losses)


def raw_outputs(cal):
    """Per site, the heads' outputs (N, H, D) at every answer token that is fed, from one pass per example."""
    seen = [[] for _ in cal.sites]
    for example in cal.examples:
        prompt = cal.tokenizer(example.question)["input_ids"]
        answer = cal.tokenizer(" " + example.answer)["input_ids"]
        handles = [
            site.output.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0][0].detach()))
            for site, rows in zip(cal.sites, seen, strict=True)
        ]
        with torch.no_grad():
            cal.lm(input_ids=torch.tensor([prompt + answer]))
        for handle, rows in zip(handles, seen, strict=True):
            handle.remove()
            rows[-1] = rows[-1][len(prompt) :]
    return [
        torch.cat(rows).unflatten(-1, (s.geometry.heads, -1)).double() for rows, s in zip(seen, cal.sites, strict=True)
    ]
