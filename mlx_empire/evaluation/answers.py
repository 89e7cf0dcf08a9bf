"""Decides whether a generated text is what was asked for: a regular expression, JSON, JSON of a schema.

A regular expression must be found in the text (anchor it with ^ and $ for the whole). JSON is the whole text, blanks
around it aside. Schemas are checked by `jsonschema`, without fetching anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema

from mlx_empire.errors import UserError


def matches(text: str, pattern: str) -> bool:
    """Whether `pattern` is found in `text`."""
    return re.search(pattern, text) is not None


def is_json(text: str) -> bool:
    """Whether the whole text is one JSON value."""
    return _parsed(text) is not _BROKEN


def fits_schema(text: str, schema: Any) -> bool:
    """Whether the whole text is one JSON value that the schema allows."""
    value = _parsed(text)
    return value is not _BROKEN and schema_checker(schema, "schema")(value)


def schema_checker(schema: Any, where: str) -> Callable[[Any], bool]:
    """What says whether a value fits `schema`. UserError for a schema that is none."""
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (jsonschema.SchemaError, AttributeError, TypeError) as error:
        reason = getattr(error, "message", str(error))
        raise UserError(f"{where}: not a JSON schema: {str(reason)[:120]}") from None
    return lambda value: bool(kind(schema).is_valid(value))


_BROKEN = object()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _BROKEN


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
