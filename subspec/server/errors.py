"""Errors in the API's form: a status, and an object with message, type, parameter and code."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from subspec.errors import SubspecError

INVALID = "invalid_request_error"


class ApiError(Exception):
    """A request that is refused, with the parameter at fault and a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kind = INVALID if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def install(app: FastAPI, on_refusal: Callable[[int], None]) -> None:
    """Answer every kind of failure in the API's form; ``on_refusal`` is told the status."""

    async def answer(_: Request, error: Exception) -> Response:
        refusal = of_exception(error)
        on_refusal(refusal.status)
        return JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)

    for kind in (ApiError, RequestValidationError, HTTPException, ClientDisconnect, SubspecError, Exception):
        app.add_exception_handler(kind, answer)


def of_exception(error: Exception) -> ApiError:
    """The answer to a failure; status 500 for a bug, whose traceback the server logs."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return of_validation(error.errors()[0])
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client has gone")  # nobody reads it
    if isinstance(error, SubspecError):  # of a text that had begun
        return ApiError(500, str(error))
    return ApiError(500, f"internal error ({type(error).__name__})")


def of_validation(problem: Mapping[str, Any]) -> ApiError:
    """The refusal of a body that is not what a request should be."""
    place: Sequence[str | int] = problem["loc"][1:]  # behind "body"
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem.get('ctx', {}).get('error', '')}")
    if not place:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message[:1].lower()}{message[1:]}", param=param)
