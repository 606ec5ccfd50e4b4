"""From a schema's complaint to one sentence that names the field and its allowed range.

pydantic reports the single bound that was crossed; the sentence here gives the whole range, read
from the JSON schema that the documentation shows, so the two cannot disagree.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Final

# Types of our own complaints: a whole sentence, or what follows the field's name.
SENTENCE: Final = "sentence"
PREDICATE: Final = "predicate"
MAX_LOCATION: Final = 80

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel, _short.maxdict, _short.maxlist = 2, 3, 3


def sentence(problem: Mapping[str, Any]) -> str:
    """One sentence for one entry of pydantic's `ValidationError.errors()`."""
    kind, place = problem["type"], _place(problem["loc"])
    if kind == SENTENCE:
        return str(problem["msg"])
    if kind == PREDICATE:
        return f"{place} {problem['msg']}"
    if kind == "json_invalid":
        return f"body must be JSON: {problem.get('ctx', {}).get('error', 'it cannot be read')}"
    if kind == "missing" and place == "body":
        return "body is required: send a JSON object"
    if kind == "missing":
        return f"{place} is required"
    if kind == "extra_forbidden":
        return f"{place} is not a known field{_known_beside(problem['loc'])}"
    if place == "body":
        return "body must be a JSON object, sent with Content-Type: application/json"
    rule = _rule(problem["loc"])
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


def _place(loc: Iterable[int | str]) -> str:
    """The field's path as a client writes it: `parameters.stop[2]`; "body" for the whole.

    A client chooses the names of unknown fields, so each is shortened and made printable.
    """
    place = ""
    for name in _names(loc):
        if isinstance(name, int):
            place += f"[{name}]"
        else:
            shown = name[:MAX_LOCATION]
            shown = shown if shown.isprintable() and shown else repr(shown)
            place += f".{shown}" if place else shown
    return place or "body"


@cache
def _schema() -> dict[str, Any]:
    from server.schemas.tgi import RootRequest  # it holds every field that a client may send

    return RootRequest.model_json_schema()


def _resolve(node: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference of the schema, and leave a single alternative to null."""
    if "$ref" in node:
        target: dict[str, Any] = _schema()["$defs"][node["$ref"].rpartition("/")[2]]
        return target
    choices = [c for c in node.get("anyOf", ()) if c.get("type") != "null"]
    return _resolve(choices[0]) if len(choices) == 1 else node


def _node(loc: Iterable[int | str]) -> dict[str, Any]:
    """The schema of the field at `loc`; empty if there is none."""
    node = _schema()
    for name in _names(loc):
        node = _resolve(node)
        inner = node.get("items") if isinstance(name, int) else node.get("properties", {}).get(name)
        if inner is None:
            return {}
        node = inner
    return _resolve(node)


def _rule(loc: Iterable[int | str]) -> str:
    """What the field at `loc` may be, in words; empty if the schema does not say."""
    return describe_schema(_node(loc))


def describe_schema(node: Mapping[str, Any]) -> str:
    """A JSON schema in words: "an integer from 1 to 10", "a list of at most 4 strings"."""
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
            return f"a list of at most {node['maxItems']} strings{_lengths(node['items'])}"
        case "object":
            return "an object"
    return ""


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
    return " of at least 1 character" if node.get("minLength") == 1 else ""


def _known_beside(loc: Iterable[int | str]) -> str:
    """The fields that exist where an unknown one was sent."""
    *parent, unknown = _names(loc)
    # `stream` is a field of POST / alone, and unknown elsewhere
    known = sorted(_node(parent).get("properties", {}).keys() - {unknown})
    return f"; known are {', '.join(known)}" if known else ""
