"""A tiny pruned model behind a real server on a free port of this machine, and what it says when asked alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import httpx2
from openai import OpenAI

from microglia.gate import Gate
from microglia.generation import Generated, generate, prompt_logits
from microglia.look import Look
from microglia.policy import AgentPolicy
from microglia.serving.app import create_app
from microglia.serving.config import ServingConfig
from microglia.serving.model import PrunedModel
from microglia.serving.run import address, listen, server_for
from microglia.sites import find_sites
from microglia.tasks.base import Task
from tests.tiny import tiny_model
from tests.tiny_folder import LETTERS, SPECIAL, character_tokenizer, opinionated

NAME = "tiny"
PATIENCE = 300  # seconds; a slow machine is no failure
CALIBRATION = [f"Question: What is {n} times {n + 3}?\nAnswer:" for n in range(12)]


def tiny_pruned(**changes) -> PrunedModel:
    """Opinionated agents on a tiny random Llama, calibrated."""
    sizes = {"vocab_size": len(SPECIAL) + len(LETTERS), "max_position_embeddings": 512, **changes}
    model, tokenizer, look = tiny_model("llama", **sizes), character_tokenizer(), Look()
    policy = opinionated(AgentPolicy([s.geometry for s in find_sites(model)], hidden_dim=16)).eval()
    logits = prompt_logits(model, tokenizer, CALIBRATION, policy, look=look)
    return PrunedModel(model, tokenizer, policy, Gate(bucket=1), look, template=Task.template, calibration=logits)


@cache
def twin() -> PrunedModel:
    """The same model once more, so that a server's may go on writing."""
    return tiny_pruned()


def alone(prompt: str, tokens: int, *, pruning: bool = True, keep_ratio: float | None = None) -> Generated:
    """What `microglia.generation` says to one prompt in a batch of one."""
    model = twin()
    gate = replace(model.gate, threshold=model.pruning(True, keep_ratio).threshold)
    policy = model.policy if pruning else None
    return generate(model.model, model.tokenizer, [prompt], policy, gate=gate, look=model.look, max_new_tokens=tokens)


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
    server = server_for(app, config)
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
