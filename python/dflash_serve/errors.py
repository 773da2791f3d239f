"""Errors, in OpenAI's shape."""

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from dflash_decode.inputs import shown

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_EXPECTED = "Input should be "
_ALTERNATIVES = {"str", "int", "float", "bool"}  # that pydantic names in the place of an error, beside lists of them


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorBody


class ApiError(Exception):
    """An error that a client is told. param: the field that is wrong. code: a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> ErrorReply:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return ErrorReply(error=ErrorBody(message=str(self), type=kind, param=self.param, code=self.code))

    def response(self) -> JSONResponse:
        return JSONResponse(self.body().model_dump(), self.status, self.headers)


def refused(param: str, expected: str, got: object, code: str | None = None) -> ApiError:
    """The error of a field that cannot be served."""
    return ApiError(400, f"{param} must be {expected}; got {shown(got)}", param, code)


def of_validation(error: ValidationError) -> ApiError:
    """The first fault that pydantic found, with the alternatives where a field may be of several types."""
    found, *others = error.errors(include_url=False, include_context=False)
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body must be JSON; got {found['msg'].removeprefix('Invalid JSON: ')}")
    param = _place(found["loc"])
    if found["type"] == "missing":
        return ApiError(400, f"{param} must be given", param)
    said = found["msg"].removeprefix("Value error, ")
    if said.startswith(_EXPECTED):
        also = [other["msg"].removeprefix(_EXPECTED) for other in others
                if _place(other["loc"]) == param and other["msg"].startswith(_EXPECTED)]
        expected = " or ".join(dict.fromkeys([said.removeprefix(_EXPECTED), *also]))
        said = f"must be {expected}; got {shown(found['input'])}"
    elif found["type"] == "too_short":
        said = "must not be empty"
    return ApiError(400, f"{param or 'the body'} {said}", param)


def _place(parts: tuple[int | str, ...]) -> str | None:
    """messages[0].content, from the path of an error."""
    place = ""
    for part in parts:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part not in _ALTERNATIVES and "[" not in part:
            place += f".{part}" if place else part
    return place or None
