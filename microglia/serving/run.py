"""Listen on a socket and serve until a signal comes; then finish the answers that are being written."""

import asyncio
import math
import signal
import socket
import threading
import time
from asyncio import TimerHandle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from microglia.errors import MicrogliaError
from microglia.serving.app import Service
from microglia.serving.config import ServingConfig

CLOSING = 5.0  # seconds for clients to read their answers, once the last of them is written
SENDING = 30.0  # seconds for a client to read what is sent to it


class Connection(H11Protocol):
    """A connection that is cut off when its client does not read what is sent."""

    unread: TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(SENDING, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.unread is not None:
            self.unread.cancel()


class Server(uvicorn.Server):
    """A server that ends with its answers, or its grace, whatever its clients do; its sockets are given to `run`."""

    def __init__(self, app: FastAPI, config: ServingConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                log_level="warning",
                access_log=False,
                ws="none",
                lifespan="on",
                server_header=False,
                timeout_graceful_shutdown=math.ceil(CLOSING),
            )
        )
        self.service: Service = app.state.service
        self.grace = math.inf if config.grace is None else config.grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections; wait for the model, then a little for the clients; cut off what is left."""
        service, connections = self.service, self.server_state.connections
        for server in self.servers:
            server.close()
        for connection in [*connections]:
            connection.shutdown()  # at once if it is idle, else after its answer
        await self._until(lambda: not service.unanswered, self.grace)
        service.cut_off(service.unanswered)
        stop = asyncio.to_thread(service.worker.stop, CLOSING)  # who asks from now on is told to ask again later
        await asyncio.gather(stop, self._until(lambda: not connections, CLOSING))
        service.cut_off(service.pending)
        for connection in [*connections]:
            connection.transport.abort()
        await super().shutdown(sockets)

    async def _until(self, done: Callable[[], bool], seconds: float) -> None:
        """Returns when it is done, the time is over, or a second Ctrl-C has come."""
        end = time.monotonic() + seconds
        while not (done() or self.force_exit or time.monotonic() >= end):
            await asyncio.sleep(0.05)


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
        Server(app, config).run(sockets=[sock])


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
