"""What a client is told when something is wrong, in OpenAI's shape: message, type, param and code, all four always."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

_RESTART_S = 5


class ApiError(Exception):
    """A refusal or failure with its HTTP status.

    Args:
        status: of the response.
        message: one line for a person.
        param: the request's field at fault.
        code: one word for a program.
        headers: of the response besides the usual.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that tells it."""
        error = {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The response that tells it; the text may hold anything, so only ASCII is written."""
        content = json.dumps(self.body).encode("ascii")
        return Response(content, self.status, self.headers, "application/json")


def _kind(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    if status in kinds:
        return kinds[status]
    return "invalid_request_error" if status < 500 else "server_error"


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_s: int) -> ApiError:
    """503: not now; the client may try again after so many seconds."""
    return ApiError(503, message, code="unavailable", headers={"retry-after": str(retry_s)})


def shutting_down() -> ApiError:
    """503: of a request that comes too late, or takes longer than the end can wait."""
    return unavailable("the server is shutting down", _RESTART_S)


def queue_full(retry_s: int) -> ApiError:
    """429: as many requests wait as may."""
    message = "the queue is full; try again later"
    return ApiError(429, message, code="queue_full", headers={"retry-after": str(retry_s)})


def too_late(seconds: float) -> ApiError:
    """504: the deadline passed; asking again at once would only add to the load."""
    message = f"not finished within {seconds:g} s"
    return ApiError(504, message, code="deadline_exceeded", headers={"x-should-retry": "false"})


def engine_failed() -> ApiError:
    """500: the engine broke down; what exactly is in the server's log."""
    return ApiError(500, "the inference engine failed", code="engine_failed", headers={"x-should-retry": "false"})
