"""Turns an error of pydantic into one sentence that names the field and its allowed range.

pydantic reports the single bound that was crossed; the sentence here gives the whole range, read
from the JSON schema that the documentation shows, so the two cannot disagree.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final

from pydantic import BaseModel

# The kinds of our own errors. The message is a whole sentence, or follows the field's name after a
# space, or without one: ".top_k must be ...".
SENTENCE: Final = "sentence"
PREDICATE: Final = "predicate"
CONTINUATION: Final = "continuation"
MAX_LOCATION: Final = 80

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel, _short.maxdict, _short.maxlist = 2, 3, 3


def sentence(problem: Mapping[str, Any], body: type[BaseModel] | None = None) -> str:
    """One sentence for one entry of pydantic's `ValidationError.errors()`.

    Args:
        problem: the entry.
        body: the model of the request's body, whose schema has the ranges.
    """
    kind, place = problem["type"], place_of(problem)
    schema = _schema(body) if body is not None else {}
    if kind == SENTENCE:
        return str(problem["msg"])
    if kind == PREDICATE:
        return f"{place} {problem['msg']}"
    if kind == CONTINUATION:
        return f"{place}{problem['msg']}"
    if kind == "json_invalid":
        return f"body must be JSON: {problem.get('ctx', {}).get('error', 'it cannot be read')}"
    if kind == "missing" and place == "body":
        return "body is required: send a JSON object"
    if kind == "missing":
        return f"{place} is required"
    if kind == "extra_forbidden":
        return f"{place} is not a known field{_known_beside(schema, problem['loc'])}"
    if place == "body":
        return "body must be a JSON object, sent with Content-Type: application/json"
    rule = describe_schema(_node(schema, problem["loc"]))
    expected = f"must be {rule}" if rule else str(problem["msg"])
    return f"{place} {expected}, got {_shown(problem.get('input'))}"


def _shown(value: Any) -> str:
    """A value as a client wrote it, cut short."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _short.repr(value)


def _names(loc: Iterable[int | str]) -> list[int | str]:
    names = list(loc)
    return names[1:] if names[:1] == ["body"] else names


def place_of(problem: Mapping[str, Any]) -> str:
    """The field's path as a client writes it: `parameters.stop[2]`; "body" for the whole.

    A client chooses the names of unknown fields, so each is shortened and made printable.
    """
    place = ""
    for name in _names(problem["loc"]):
        if isinstance(name, int):
            place += f"[{name}]"
        else:
            shown = name[:MAX_LOCATION]
            shown = shown if shown.isprintable() and shown else repr(shown)
            place += f".{shown}" if place else shown
    return place or "body"


@cache
def _schema(body: type[BaseModel]) -> dict[str, Any]:
    return body.model_json_schema()


def _resolve(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference of the schema, and leave a single alternative to null."""
    if "$ref" in node:
        target: dict[str, Any] = schema["$defs"][node["$ref"].rpartition("/")[2]]
        return target
    choices = [c for c in node.get("anyOf", ()) if c.get("type") != "null"]
    return _resolve(schema, choices[0]) if len(choices) == 1 else node


def _node(schema: dict[str, Any], loc: Iterable[int | str]) -> dict[str, Any]:
    """The schema of the field at `loc`; empty if there is none."""
    node = schema
    for name in _names(loc):
        node = _resolve(schema, node)
        inner = node.get("items") if isinstance(name, int) else node.get("properties", {}).get(name)
        if inner is None:
            return {}
        node = inner
    return _resolve(schema, node)


def describe_schema(node: Mapping[str, Any]) -> str:
    """A JSON schema in words: "an integer from 1 to 10", "a list of at most 4 strings"."""
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}"
    match node.get("type"):
        case "integer":
            return f"an integer{_bounds(node)}"
        case "number":
            return f"a number{_bounds(node)}"
        case "boolean":
            return "true or false"
        case "string":
            return f"a string{_lengths(node)}"
        case "array":
            return _list(node)
        case "object":
            return "an object"
    return ""


def _list(node: Mapping[str, Any]) -> str:
    """An array in words, such as `a list of at most 4 strings of 1 to 9 characters`."""
    low, high = node.get("minItems", 0), node.get("maxItems")
    size = f"of {low} to {high}" if low else f"of at most {high}"
    items = node.get("items", {})
    if items.get("type") == "string":
        return f"a list {size} strings{_lengths(items)}"
    return f"a list {size} {'integers' if items.get('type') == 'integer' else 'objects'}"


def _bounds(node: Mapping[str, Any]) -> str:
    """What follows a number's kind: ` from 1 to 10`, ` above 0 and at most 1`, or nothing."""
    if "exclusiveMinimum" in node:
        return f" above {node['exclusiveMinimum']:g} and at most {node['maximum']:g}"
    if "minimum" in node:
        low, high = _number(node["minimum"]), _number(node["maximum"])
        return f" from {low} to {high}" if low != high else f" equal to {low}"
    return ""


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _lengths(node: Mapping[str, Any]) -> str:
    if "maxLength" in node:
        return f" of {node.get('minLength', 0)} to {node['maxLength']} characters"
    if "pattern" in node:
        return f" that matches {node['pattern']}"
    return " of at least 1 character" if node.get("minLength") == 1 else ""


def _known_beside(schema: dict[str, Any], loc: Iterable[int | str]) -> str:
    """The fields that exist where an unknown one was sent."""
    *parent, unknown = _names(loc)
    known = sorted(_node(schema, parent).get("properties", {}).keys() - {unknown})
    return f"; known are {', '.join(known)}" if known else ""
