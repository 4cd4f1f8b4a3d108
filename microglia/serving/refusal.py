"""Every refusal is an OpenAI error object with one sentence in it, whatever layer it comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from microglia.errors import MicrogliaError
from microglia.serving.worker import Full, Stopped

SHOWN = 60  # characters of a wrong value that a sentence repeats


class Refusal(Exception):
    """A request that is not answered: HTTP status, sentence, and OpenAI's type, param and code."""

    def __init__(
        self, status: int, sentence: str, *, param: str | None = None, code: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        told = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {name: value and _encodable(value) for name, value in told.items()}}

    @property
    def headers(self) -> dict[str, str]:
        return {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(self.status, {})


def refusal(error: Exception) -> Refusal:
    """Any exception as a refusal; what is not meant for clients becomes a 500 without details."""
    match error:
        case Refusal():
            return error
        case Full():
            return Refusal(429, str(error), code="rate_limit_exceeded", kind="rate_limit_error")
        case Stopped():
            return Refusal(503, str(error), code="stopping")
        case MicrogliaError():
            return Refusal(400, str(error))
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException(status_code=413):
            return Refusal(413, "the request is larger than this server reads; send less text", code="body_too_large")
        case HTTPException():
            return Refusal(error.status_code, _http(error))
    return Refusal(500, "something in the server failed; its log says what")


def install(app: FastAPI) -> None:
    """Let `app` answer every exception with a refusal."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        told = refusal(error)
        return JSONResponse(told.body, told.status, headers=told.headers)

    for kind in (Refusal, MicrogliaError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)


def _encodable(text: str) -> str:
    """JSON may carry half a surrogate pair, UTF-8 may not."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _http(error: HTTPException) -> str:
    known = {
        404: "there is nothing at this address; POST to /v1/chat/completions or /v1/completions",
        405: "this address does not take this method; POST completions, GET everything else",
    }
    return known.get(error.status_code, str(error.detail))


def _invalid(errors: Sequence[Any]) -> Refusal:
    """The first thing that is wrong with a body, in a sentence."""
    if not errors:
        return Refusal(400, "the body could not be read; send a JSON object")
    # Of a union's branches the one that came furthest says what is meant; their names stand in the path, and the client
    # knows fields only.
    field = errors[0]["loc"][:2]
    error: Mapping[str, Any] = max(
        (e for e in errors if e["loc"][:2] == field), key=lambda e: (len(e["loc"]), e["type"] != "string_type")
    )
    *path, last = (str(part) for part in error["loc"])
    path = [part for part in path if part not in ("body", "str") and "[" not in part]
    if error["type"] == "extra_forbidden" or not (last in ("body", "str") or "[" in last):
        path.append(last)
    param = ".".join(path) or None
    given = repr(error.get("input"))
    given = given if len(given) <= SHOWN else given[:SHOWN] + "…"
    match error["type"]:
        case "json_invalid":
            return Refusal(400, "the body is no JSON; send a JSON object with Content-Type: application/json")
        case "missing":
            what = f"{param} is missing" if param else "the body is missing"
            return Refusal(400, f"{what}; give it", param=param, code="missing_required_parameter")
        case "extra_forbidden":
            return Refusal(
                400, f"{param} is nothing that this server does; leave it out", param=param, code="unknown_parameter"
            )
        case "literal_error":
            return Refusal(
                400,
                f"{param}={given} is not supported; give {error['ctx']['expected']}",
                param=param,
                code="unsupported_value",
            )
        case "model_attributes_type" | "dict_type" if param is None:
            return Refusal(400, "the body is no JSON object; send one with Content-Type: application/json")
    message = str(error["msg"])
    return Refusal(400, f"{param}={given} was given; {message[:1].lower()}{message[1:]}", param=param)
