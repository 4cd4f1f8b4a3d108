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
HTTP_SENTENCES = {
    404: "there is nothing at this address; POST to /v1/chat/completions or /v1/completions",
    405: "this address does not take this method; POST completions, GET everything else",
    408: "the request's body did not arrive in time; send it again, all at once",
    413: "the request is larger than this server reads; send less text",
}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 429: {"Retry-After": "1"}}
CODES = {408: "body_timeout", 413: "body_too_large"}


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
        """OpenAI's error object."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        # JSON may carry half a surrogate pair, UTF-8 may not.
        return {"error": {k: v and v.encode("utf-8", "backslashreplace").decode("utf-8") for k, v in error.items()}}

    @property
    def response(self) -> JSONResponse:
        headers = HEADERS.get(self.status)
        return JSONResponse(self.body, self.status, headers)


def refusal_of(error: Exception) -> Refusal:
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
        case HTTPException(status_code=status):
            return Refusal(status, HTTP_SENTENCES.get(status, str(error.detail)), code=CODES.get(status))
    return Refusal(500, "something in the server failed; its log says what")


def install(app: FastAPI) -> None:
    """Let `app` answer every exception with a refusal."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        return refusal_of(error).response

    for kind in (Refusal, MicrogliaError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, refuse)


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
    value = repr(error.get("input"))
    value = value if len(value) <= SHOWN else value[:SHOWN] + "…"
    code: str | None
    match error["type"]:
        case "json_invalid":
            return Refusal(400, "the body is no JSON; send a JSON object with Content-Type: application/json")
        case "model_attributes_type" | "dict_type" if param is None:
            return Refusal(400, "the body is no JSON object; send one with Content-Type: application/json")
        case "missing":
            sentence, code = f"{param or 'the body'} is missing; give it", "missing_required_parameter"
        case "extra_forbidden":
            sentence, code = f"{param} is nothing that this server does; leave it out", "unknown_parameter"
        case "literal_error":
            expected = error["ctx"]["expected"]
            sentence, code = f"{param}={value} is not supported; give {expected}", "unsupported_value"
        case _:
            message = str(error["msg"])
            sentence, code = f"{param}={value} was given; {message[:1].lower()}{message[1:]}", None
    return Refusal(400, sentence, param=param, code=code)
