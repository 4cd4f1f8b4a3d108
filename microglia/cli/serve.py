"""`microglia serve`: answer over HTTP as OpenAI's API does."""

import os
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from microglia.cli import options as o
from microglia.cli.verb import Outcome, tell, verb
from microglia.errors import MicrogliaError

API_KEY = "MICROGLIA_API_KEY"


@verb()
def serve(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: a folder that `train` wrote, or a hub id.")],
    *,
    host: Annotated[str, "Address to listen on; anything but loopback needs an API key."] = "127.0.0.1",
    port: Annotated[int, "Port to listen on; 0 takes a free one."] = 8000,
    name: Annotated[str | None, "Name of the model in requests.", "the checkpoint's"] = None,
    api_key: Annotated[str | None, "Bearer token that clients must send.", f"${API_KEY}"] = None,
    keep_ratio: o.KeepRatio = None,
    bytes: o.Bytes = None,
    execution: o.Execution = "compact",
    max_batch: Annotated[int, "Prompts that are answered together."] = 16,
    max_waiting: Annotated[int, "Prompts in the queue; more are refused with 429."] = 64,
    max_new_tokens: Annotated[int, "Longest answer in tokens."] = 1024,
    max_prompt_tokens: Annotated[int | None, "Longest prompt in tokens.", "the model's context"] = None,
    max_body_bytes: Annotated[int, "Largest request in bytes."] = 1 << 20,
    batch_by: Annotated[
        Literal["settings", "decision", "mask"],
        "settings: by age. decision: under load, prompts that keep as many heads together. mask: the same heads only.",
    ] = "settings",
    grace: Annotated[float | None, "Seconds that running answers get at the end.", "all they need"] = None,
    loading: o.Loading,
    settings: dict[str, Any],
) -> Outcome:
    """Serve the pruned model to OpenAI's clients until Ctrl-C; running answers are finished first.

    microglia serve checkpoints --port 8000
    """
    from microglia.execution import kind_of

    try:
        from microglia.serving.app import create_app
        from microglia.serving.config import ServingConfig
        from microglia.serving.model import PrunedModel
        from microglia.serving.run import serve as run
    except ImportError as error:
        raise MicrogliaError(
            f"microglia serve needs {error.name}, which is not installed; pip install 'microglia[serve]'"
        ) from error
    given = {field.name: settings[field.name] for field in fields(ServingConfig)}
    given["name"] = name if name is not None else Path(checkpoint).name or checkpoint
    key = api_key if api_key is not None else os.environ.get(API_KEY) or None
    given["api_key"] = key and key.strip()  # a file that it was read from ends in a line break
    config = ServingConfig(**given)
    kind_of(execution)  # what is wrong with it is better known before loading a model
    system = loading.system(checkpoint)
    if keep_ratio is not None or bytes is not None:
        system.set_keep_ratio(keep_ratio, byte_share=bytes)
    model = PrunedModel(system.model, system.tokenizer, system.pruner, system.template, execution)
    app = create_app(model, config)
    with suppress(KeyboardInterrupt):  # the server has caught it first and let every answer end
        run(app, config, ready=lambda url: tell(f"microglia: serving {config.name} at {url} (Ctrl-C stops)"))
    cut = len(app.state.service.cut)
    tell(f"microglia: stopped; {f'running answers cut off: {cut}' if cut else 'every running answer was finished'}")
    return Outcome(totals(app))


def totals(app: Any) -> dict[str, Any]:
    """What was answered while the server ran."""
    read = app.state.service.metrics.registry.get_sample_value
    answers = {reason: int(read("microglia_answers_total", {"reason": reason}) or 0) for reason in REASONS}
    counts = {name: int(read(f"microglia_{name}_total") or 0) for name in ("prompt_tokens", "completion_tokens")}
    return {"answers": answers, **counts}


REASONS = ("stop", "length", "cut")
