"""The addresses of the server: completions, models, health and metrics."""

import asyncio
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import ExitStack, asynccontextmanager
from functools import cache
from typing import Any

from anyio import CancelScope, CapacityLimiter, current_time
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from microglia import __version__
from microglia.serving import schema as s
from microglia.serving.admission import Admission, unknown_model
from microglia.serving.answers import PendingRequest
from microglia.serving.config import ServingConfig
from microglia.serving.metrics import CONTENT_TYPE, Metrics
from microglia.serving.model import PrunedModel
from microglia.serving.refusal import SHOWN, Refusal, install, refusal_of
from microglia.serving.worker import Worker

CLIENT_CLOSED = 499  # what nginx calls a client that hung up; nobody reads it, the metrics count it
PORT = re.compile(r":\d*$")
LOOPBACK_NAMES = {"127.0.0.1", "localhost", "[::1]"}
RECEIVING = 30.0  # seconds in which a request's body must have arrived
LAST_STEP = 5.0  # seconds for the step that the model is at when nobody waits for its answers any more
BEARER = HTTPBearer(auto_error=False, description="The server's API key, if it has one.")
Responses = dict[int | str, dict[str, Any]]
DESCRIPTIONS: dict[int | str, str] = {
    400: "The request is wrong, or asks for what this server does not do.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full.",
    "4XX": "Refused.",
    500: "The model failed.",
    503: "The server is shutting down.",
}
REFUSALS: Responses = {status: {"model": s.Error, "description": text} for status, text in DESCRIPTIONS.items()}


def _events(kind: str) -> Responses:
    """What a completion's address returns beside JSON: events with a `kind` each, the last with the text [DONE]."""
    content_schema = {"$ref": f"#/components/schemas/{kind}"}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content_schema}
    text = "The answer; with `stream`, server-sent events, whose data is this, or an error, and at the end [DONE]."
    return {200: {"description": text, "content": {"text/event-stream": {"schema": data}}}}


def create_app(model: PrunedModel, config: ServingConfig) -> FastAPI:
    """The server's application. The model's thread lives as long as the application does."""
    service = Service(model, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop, LAST_STEP)

    app = FastAPI(
        title="microglia",
        version=__version__,
        description="Completions of a model that keeps the attention heads a prompt needs.",
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from elsewhere; the schema itself is at /openapi.json
        redoc_url=None,
    )
    install(app)
    app.add_middleware(_BodyLimit, most=config.max_body_bytes)
    app.add_middleware(_RequestCounter, metrics=service.metrics)
    if config.loopback and config.api_key is None:
        # A page in a browser on this machine must not reach the model through a name that it lets point here.
        host = f"[{config.host}]" if ":" in config.host else config.host
        app.add_middleware(_HostNames, names=LOOPBACK_NAMES | {host})
    app.include_router(service.open_addresses())
    app.include_router(service.guarded_addresses())
    openapi = app.openapi
    app.openapi = cache(lambda: s.with_chunks(openapi()))  # type: ignore[method-assign]
    app.state.service = service
    return app


class Service:
    """What the addresses share. cut: the requests whose answers the end of the server took away."""

    def __init__(self, model: PrunedModel, config: ServingConfig) -> None:
        self.config, self.admission = config, Admission(model, config)
        self.worker = Worker(model, config, on_batch=lambda jobs: self.metrics.batch(jobs))
        self.metrics = Metrics(lambda: len(self.worker.waiting), lambda: len(self.worker.running))
        self.tokenizer_limiter = CapacityLimiter(1)  # no two threads may use it at once
        self.card = s.ModelCard(id=config.name, created=int(time.time()))
        self.pending: set[PendingRequest] = set()
        self.cut: set[PendingRequest] = set()

    @property
    def unanswered(self) -> set[PendingRequest]:
        """The requests that the model has not answered yet."""
        return {pending for pending in self.pending if not pending.answered}

    def cut_off(self, requests: Collection[PendingRequest]) -> None:
        """End requests without the rest of their answers."""
        self.cut |= {*requests}
        for pending in requests:
            pending.cut()

    def open_addresses(self) -> APIRouter:
        """Health and metrics, which need no key."""
        router = APIRouter()

        @router.get("/health", responses={503: {"model": s.Health}})
        async def health(response: Response) -> s.Health:
            """Whether questions are answered."""
            response.status_code = 200 if self.worker.alive else 503
            return s.Health(
                status="ok" if self.worker.alive else "stopping",
                waiting=len(self.worker.waiting),
                running=len(self.worker.running),
            )

        @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
        async def metrics() -> Response:
            """Counters for Prometheus."""
            return Response(self.metrics.text(), media_type=CONTENT_TYPE)

        return router

    def guarded_addresses(self) -> APIRouter:
        """OpenAI's addresses."""
        route = _route_guarded_by(self.config.api_key)
        # The dependency is for /openapi.json.
        router = APIRouter(prefix="/v1", route_class=route, dependencies=[Depends(BEARER)], responses=REFUSALS)

        @router.get("/models")
        async def models() -> s.ModelList:
            """The one model that there is."""
            return s.ModelList(data=[self.card])

        @router.get("/models/{name:path}")
        async def model(name: str) -> s.ModelCard:
            if name != self.config.name:
                raise unknown_model(name)
            return self.card

        @router.post("/chat/completions", response_model=s.ChatCompletion, responses=_events("ChatChunk"))
        async def chat(body: s.ChatRequest, request: Request) -> Any:
            """Answer a conversation."""
            return await self.complete(body, request)

        @router.post("/completions", response_model=s.Completion, responses=_events("Completion"))
        async def completions(body: s.CompletionRequest, request: Request) -> Any:
            """Continue a prompt, or several."""
            return await self.complete(body, request)

        return router

    async def complete(self, body: s.ChatRequest | s.CompletionRequest, request: Request) -> Any:
        """Admit a request, queue its jobs, and answer it at once or piece by piece."""
        pending = PendingRequest(body.model, isinstance(body, s.ChatRequest), self.metrics)
        self.pending.add(pending)
        with ExitStack() as stack:
            stack.callback(self.pending.discard, pending)
            # In a thread, so that a long prompt does not hold up the others' pieces.
            pending.jobs = await run_sync(self.admission.jobs, body, pending.receiver, limiter=self.tokenizer_limiter)
            self.worker.submit(pending.jobs)
            stack.callback(pending.cancel)
            if body.stream:
                with_usage = bool(body.stream_options and body.stream_options.include_usage)
                return _Events(pending.stream(with_usage), stack.pop_all().close)
            answer, disconnect = asyncio.create_task(pending.answer()), asyncio.create_task(_disconnected(request))
            stack.callback(answer.cancel)
            stack.callback(disconnect.cancel)
            await asyncio.wait({answer, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else Response(status_code=CLIENT_CLOSED)


def _route_guarded_by(key: str | None) -> type[APIRoute]:
    """A route that looks at the API key, if there is one, before it reads anything of the body."""

    class Guarded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def guarded(request: Request) -> Response:
                if key is not None:
                    check_key(await BEARER(request), key)
                return await handle(request)

            return guarded

    return Guarded


def check_key(credentials: HTTPAuthorizationCredentials | None, key: str) -> None:
    """Refuses what a request without the API key carries."""
    if credentials and secrets.compare_digest(credentials.credentials.encode(), key.encode()):
        return
    sentence = f"{'the API key is wrong' if credentials else 'no API key was given'}; send Authorization: Bearer KEY"
    raise Refusal(401, sentence, code="invalid_api_key", kind="authentication_error")


class _Events(StreamingResponse):
    """Server-sent events; `on_close` is called at their end, also when the client hangs up before the first."""

    def __init__(self, events: AsyncIterator[str], on_close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_close()


async def _disconnected(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _BodyLimit:
    """Refuses bodies of more than `most` bytes before they are read, or while, if they do not say how long they are.

    And those that have not arrived after RECEIVING seconds.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """FastAPI's own max_body_size refuses with plain text, which OpenAI's clients cannot read."""
        length = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if length.isdecimal() and int(length) > self.most:
            return await refusal_of(HTTPException(413)).response(scope, receive, send)
        total, deadline = 0, current_time() + RECEIVING

        async def receive_limited() -> Message:
            nonlocal total, deadline
            with CancelScope(deadline=deadline):
                message = await receive()
                total += len(message.get("body", b""))
                if total > self.most:
                    raise HTTPException(413)
                if not message.get("more_body"):  # what is waited for from now on is that the client hangs up
                    deadline = math.inf
                return message
            raise HTTPException(408)

        await self.app(scope, receive_limited if scope["type"] == "http" else receive, send)


class _HostNames:
    """Refuses requests to other host names than `names`; starlette's own refuses with plain text."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = PORT.sub("", Headers(scope=scope).get("host", "")).lower()
            if name not in self.names:
                sentence = f"this server does not answer as {name[:SHOWN]!r}; send requests to http://127.0.0.1:PORT"
                return await Refusal(400, sentence, code="unknown_host").response(scope, receive, send)
        await self.app(scope, receive, send)


class _RequestCounter:
    """Counts requests by address and status, whoever answers them."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # the pattern and not the path: an address made up by a client is no label
                path = getattr(route, "path", "other")
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, send_counted)
