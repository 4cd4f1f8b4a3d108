"""Listen on a socket and serve until a signal comes; then finish the answers that are being written."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil

import uvicorn
from fastapi import FastAPI

from microglia.errors import MicrogliaError
from microglia.serving.config import ServingConfig


def server_for(app: FastAPI, config: ServingConfig) -> uvicorn.Server:
    """A uvicorn server of `app`; its sockets are given to `run`."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            ws="none",
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=None if config.grace is None else ceil(config.grace),
        )
    )


def listen(config: ServingConfig) -> socket.socket:
    """The socket that the server accepts from. Raises MicrogliaError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=512)
    except OSError as error:
        raise MicrogliaError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror or error}); choose another --port or "
            "--host"
        ) from error


def address(sock: socket.socket) -> str:
    """Where clients find the server, as a base URL for OpenAI's client."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def serve(app: FastAPI, config: ServingConfig, *, ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGINT or SIGTERM. `ready(url)` is called when connections are accepted.

    Raises KeyboardInterrupt after a graceful end by either, as uvicorn hands the signal on.
    """
    with listen(config) as sock, _term_as_interrupt():
        ready(address(sock))
        server_for(app, config).run(sockets=[sock])


@contextmanager
def _term_as_interrupt() -> Iterator[None]:
    """Inside, SIGTERM is what Ctrl-C is. Else, handed on by uvicorn, it would end the process before its last words."""
    if threading.current_thread() is not threading.main_thread():  # the only one that signals reach
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
