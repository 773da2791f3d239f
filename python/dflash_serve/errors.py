"""Errors, in OpenAI's shape."""

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from dflash_decode.inputs import shown

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# What a value must be, by the kinds of pydantic's errors.
_MUST_BE = {
    "bool_type": "true or false", "dict_type": "an object", "finite_number": "a finite number",
    "float_type": "a number", "greater_than_equal": "at least {ge}", "int_from_float": "an integer",
    "int_parsing": "an integer", "int_parsing_size": "an integer of 64 bits", "int_type": "an integer",
    "less_than_equal": "at most {le}", "list_type": "a list", "literal_error": "{expected}",
    "model_type": "an object", "string_too_long": "a text of at most {max_length} characters",
    "string_type": "a text", "too_long": "a list of at most {max_length}",
}
# What pydantic names in the place of an error, beside lists of them, where a field may be of several types.
_ALTERNATIVES = {"str", "constrained-str", "int", "float", "bool"}


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
    """The first fault that pydantic found, with the alternatives where a field may be of several types. Of a list that
    may also be a text, it is the element's."""
    faults = error.errors(include_url=False)
    if faults[0]["type"] == "json_invalid":
        return ApiError(400, f"the body must be JSON; got {faults[0]['msg'].removeprefix('Invalid JSON: ')}")
    first = _place(faults[0]["loc"])
    found = next((one for one in faults[1:] if first and (_place(one["loc"]) or "").startswith(f"{first}[")), faults[0])
    param = _place(found["loc"])
    if found["type"] == "missing":
        return ApiError(400, f"{param} must be given", param)
    if found["type"] in _MUST_BE:
        alike = [one for one in faults if _place(one["loc"]) == param and one["type"] in _MUST_BE]
        expected = " or ".join(dict.fromkeys(_MUST_BE[one["type"]].format(**one.get("ctx", {})) for one in alike))
        said = f"must be {expected}; got {shown(found['input'])}"
    else:
        said = "must not be empty" if found["type"] == "too_short" else found["msg"].removeprefix("Value error, ")
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
