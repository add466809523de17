"""Reading the JSON body of a request field by field, or refusing it with what to change."""

import json
import uuid
from typing import Any, TypeAlias, TypeVar

from gpt3jax import errors
from gpt3jax.sample import sampling_options

JsonObject: TypeAlias = dict[str, object]
Value = TypeVar("Value")
Number = TypeVar("Number", int, float)

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class RefusedError(Exception):
    """A request that is answered with an error status.

    Attributes:
        field: the field at fault, "" for none.
        status: of HTTP.
        code: OpenAI's error code, "" for none.
    """

    def __init__(self, message: str, field: str = "", status: int = 400, code: str = ""):
        super().__init__(message)
        self.field, self.status, self.code = field, status, code


def parse(content: bytes, known: set[str]) -> JsonObject:
    """Return the fields of a body that are not null.

    Raises:
        RefusedError: the body is not a JSON object of known fields.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RefusedError("the request must be a JSON object")
    unknown = sorted(body.keys() - known)
    if unknown:
        name = ascii(unknown[0])[1:-1]
        raise RefusedError(f"{name} is not supported: leave it out", name)
    return {name: value for name, value in body.items() if value is not None}


def read(body: JsonObject, name: str, kind: type[Value], default: Value) -> Value:
    """Return a field of this kind, or the default where it is absent.

    Raises:
        RefusedError: the field is of another kind.
    """
    if name not in body:
        return default
    value: Any = body[name]
    is_right = type(value) is kind or (kind is float and type(value) is int)
    if not is_right:
        raise RefusedError(f"{name} must be {_KINDS[kind]}", name)
    return value


def read_integer(body: JsonObject, name: str, default: int, allowed: range) -> int:
    """Return an integer that is allowed, or the default where the field is absent.

    Raises:
        RefusedError: the field has another value.
    """
    value = read(body, name, int, default)
    if value not in allowed:
        raise RefusedError(
            f"{name}={value} must be at least {allowed[0]} and at most {allowed[-1]}", name
        )
    return value


def read_seed(body: JsonObject, name: str) -> int:
    """Return the seed of 32 bits that stands for any integer; a random one where it is absent.

    Raises:
        RefusedError: the field is not an integer.
    """
    return read(body, name, int, uuid.uuid4().int) % 2**32


def read_option(body: JsonObject, name: str, kind: type[Number], default: Number) -> Number:
    """Return the value of a field of `sampling_options.Options`.

    Raises:
        RefusedError: the field is of another kind, or out of its range.
    """
    value = read(body, name, kind, default)
    check_option(name, value)
    return value


def check_option(name: str, value: float) -> None:
    """Check the range of a field of `sampling_options.Options`.

    Raises:
        RefusedError: the value is out of its range.
    """
    changed: dict[str, Any] = {name: value}
    try:
        sampling_options.Options(**changed).check()
    except errors.UserError as error:
        raise RefusedError(error.message, name) from None
