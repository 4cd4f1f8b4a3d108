"""`microglia generate`: answer questions with the heads that each of them needs."""

import sys
from typing import Annotated

import typer

from microglia.cli import options as o
from microglia.cli.bundles import Fields
from microglia.cli.verb import Outcome, verb
from microglia.errors import DataError


@verb()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Questions; without any, one is read from stdin.", show_default=False)
    ] = None,
    *,
    model_path: o.ShippedOrPath = None,
    keep_ratio: o.KeepRatio = None,
    bytes: o.Bytes = None,
    raw: o.Raw = False,
    generation: Annotated[o.Generation, Fields(without=("batch_size",))],
    loading: o.Loading,
) -> Outcome:
    """Answer one question or several.

    microglia generate "What is 15% of 240?" --model-path checkpoints
    """
    from rich.text import Text

    from microglia.results import AnswerText, GenerationResult

    questions = prompts or [_from_stdin()]
    system = loading.system(loading.checkpoint(model_path))
    budget = {"keep_ratio": keep_ratio, "byte_share": bytes}
    texts = system.generate(questions, generation.max_new_tokens, execution=generation.execution, raw=raw, **budget)
    rows = [
        AnswerText(prompt=question, text=text, sparsity=sparsity)
        for question, text, sparsity in zip(questions, texts, system.get_sparsities(), strict=True)
    ]
    what = "heads" if system.pruner.units == ("head",) else "units"
    view = [Text.assemble(row.text, "\n", (f"{row.sparsity:.0%} of the {what} pruned", "dim")) for row in rows]
    return Outcome(GenerationResult(answers=tuple(rows), sparsity=system.get_sparsity()).to_json(), view)


def _from_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(f"what stdin gave is not {error.encoding} ({error.reason}); give it as UTF-8 text") from error
