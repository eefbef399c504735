"""What is read is checked: a schema is a frozen dataclass whose fields say, in pydantic's terms, what they take.

A field is ``Annotated[type, constraints, Rule("must be ...")]``. The same schema checks an instance made in Python
(``check_fields`` in its ``__post_init__``) and JSON text (``from_json``); what is refused is named by field, rule and
value in one line. Nothing is coerced but whole numbers to floats, lists to tuples and numpy's numbers to Python's:
neither '12' nor 12.0 is the int 12, and no bool is a number.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Annotated, Any, TypeVar, get_type_hints

from narrowdeep.checks import shown
from narrowdeep.extras import optional

with optional():
    from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
    from pydantic_core import core_schema

T = TypeVar("T")

_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not known",
    "json_invalid": "must be JSON",
    "model_type": "must be an object",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be, in words, whatever is wrong with it."""

    text: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), custom_error_type="rule", custom_error_message=self.text
        )


def _as_int(value: Any) -> Any:
    return value if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)


def _as_float(value: Any) -> Any:
    """A number that no float can hold is infinity, which every rule here refuses."""
    try:
        return value if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:
        return math.inf


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def below_2_63(value: int) -> int:
    """``value``. Raises: ValueError where the engine's 64-bit integers cannot hold it."""
    if value >= 2**63:
        raise ValueError("must be below 2**63")
    return value


Integer = Annotated[int, BeforeValidator(_as_int)]
"""Any int."""
Number = Annotated[float, BeforeValidator(_as_float)]
"""Any finite number, as a float."""
Pair = Annotated[tuple[Integer, Integer], BeforeValidator(_as_tuple)]

Count = Annotated[Integer, Field(ge=1), Rule("must be an int of at least 1"), AfterValidator(below_2_63)]
Index = Annotated[Integer, Field(ge=0), Rule("must be an int of at least 0"), AfterValidator(below_2_63)]
Positive = Annotated[Number, Field(gt=0), Rule("must be finite and positive")]
NotNegative = Annotated[Number, Field(ge=0), Rule("must be finite and not negative")]
Finite = Annotated[Number, Rule("must be a finite number")]
Share = Annotated[Number, Field(ge=0, le=1), Rule("must be between 0 and 1")]


def from_json(schema: type[T], text: str | bytes) -> T:
    """The instance of a schema that JSON text holds.

    Raises: ValueError naming the field, the rule and the value.
    """
    try:
        found = _model(schema).model_validate_json(text)
    except ValidationError as error:
        raise ValueError(_line(error)) from None
    return _build(schema, found)


def check_fields(instance: Any) -> None:
    """Check a frozen dataclass against its own schema, in its ``__post_init__``; numbers become Python's.

    Raises: ValueError naming the field, the rule and the value.
    """
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    try:
        found = _model(type(instance)).model_validate(values)
    except ValidationError as error:
        raise ValueError(_line(error)) from None
    for name in values:
        object.__setattr__(instance, name, getattr(found, name))


def _build(schema: type[T], found: BaseModel) -> T:
    hints = get_type_hints(schema)
    values = {name: getattr(found, name) for name in type(found).model_fields}
    return schema(**{n: _build(hints[n], v) if isinstance(v, BaseModel) else v for n, v in values.items()})


_models: dict[type, type[BaseModel]] = {}


def _model(schema: Any) -> type[BaseModel]:
    """pydantic's model of a schema."""
    if schema in _models:
        return _models[schema]
    hints = get_type_hints(schema, include_extras=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        default = ... if field.default is dataclasses.MISSING else field.default
        kind = hints[field.name]
        fields[field.name] = (_model(kind) if dataclasses.is_dataclass(kind) else kind, default)
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model = _models[schema] = create_model(schema.__name__, __config__=config, **fields)
    return model


def _line(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, ").replace("Input should", "must"))
    text = f"{field} {message}" if field else f"it {message}"
    return text if first["type"] == "missing" else f"{text}, got {shown(first['input'])}"
