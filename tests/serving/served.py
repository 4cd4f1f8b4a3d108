"""A tiny pruned model behind a real server on a free port of this machine, and what the library says to each prompt."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import httpx2
from openai import OpenAI

from microglia.gate import Gate
from microglia.generation import Generated, generate
from microglia.reading import read_prompts
from microglia.serving.app import create_app
from microglia.serving.config import ServingConfig
from microglia.serving.model import PrunedModel
from microglia.serving.run import Server, address, listen
from microglia.tasks.base import Task
from tests.tiny import geometries_of, tiny_model
from tests.tiny_folder import LETTERS, SPECIAL, character_tokenizer, opinionated_pruner

NAME = "tiny"
PATIENCE = 300  # seconds; a slow machine is no failure
CALIBRATION = [f"Question: What is {n} times {n + 3}?\nAnswer:" for n in range(12)]


def tiny_pruned(execution: str = "compact", **changes) -> PrunedModel:
    """Opinionated agents on a tiny random Llama, calibrated."""
    sizes = {"vocab_size": len(SPECIAL) + len(LETTERS), "max_position_embeddings": 512, **changes}
    model, tokenizer = tiny_model("llama", **sizes), character_tokenizer()
    pruner = opinionated_pruner(model, gate=Gate(bucket=1))
    logits = read_prompts(model, tokenizer, CALIBRATION, pruner).logits
    return PrunedModel(model, tokenizer, pruner.with_budget(logits, geometries_of(model)), Task.template, execution)


@cache
def reference(execution: str) -> PrunedModel:
    """The same model once more, so that a server's may go on writing."""
    return tiny_pruned(execution)


def alone(
    prompt: str,
    tokens: int,
    *,
    pruning: bool = True,
    keep_ratio: float | None = None,
    execution: str = "compact",
    **options,
) -> Generated:
    """What `microglia.generation` says to one prompt in a batch of one; `options` go to the model's `generate`."""
    model = reference(execution)
    pruner = model.pruner.at(keep_ratio) if pruning else None
    options |= {"execution": model.executor, "max_new_tokens": tokens}
    return generate(model.model, model.tokenizer, [prompt], pruner, **options)


@dataclass
class Served:
    """A running server: where it is, the model in it, a client, and a switch that makes it stop."""

    url: str
    model: PrunedModel
    app: object
    client: OpenAI
    http: httpx2.Client
    server: object
    thread: threading.Thread

    @contextmanager
    def held(self) -> Iterator[threading.Event]:
        """While inside, the model waits at its next step until the event is set."""
        go = threading.Event()
        reached = threading.Event()

        def wait(*_):
            reached.set()
            assert go.wait(PATIENCE)

        hook = self.model.lm.register_forward_pre_hook(wait)
        go.reached = reached
        try:
            yield go
        finally:
            go.set()
            hook.remove()

    def metric(self, name: str, **labels: str) -> float:
        return self.app.state.service.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def running(model: PrunedModel, **options) -> Iterator[Served]:
    """A server of `model`; `options` of ServingConfig."""
    config = ServingConfig(**{"name": NAME, "port": 0, "max_waiting": 256, **options})
    app = create_app(model, config)
    sock = listen(config)
    server = Server(app, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    url = address(sock)
    thread.start()
    key = config.api_key or "none"
    client = OpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE)
    with client, httpx2.Client(base_url=url.removesuffix("/v1"), timeout=PATIENCE) as http:
        try:
            yield Served(url, model, app, client, http, server, thread)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()
