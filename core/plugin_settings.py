"""A plugin's own settings: from `--set KEY=VALUE` and run.toml to its validated Config."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from prunus.core.errors import ConfigError
from prunus.core.importance import PluginConfig

_ABSENT = {"none", "null"}


def parse_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """`["rounds=3", "scope=global"]` as a mapping, values still text. Raises ConfigError."""
    values: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {text!r} is not understood; write --set KEY=VALUE", key="set")
        if key in values:
            raise ConfigError(f"--set {key} is given twice", key=key)
        values[key] = value.strip()
    return values


def configure(config: type[PluginConfig], plugin: str, values: Mapping[str, Any]) -> PluginConfig:
    """`config` with `values`, text converted to the type each setting has.

    Raises ConfigError that names the plugin and the setting; for an unknown one the nearest.
    """
    known = set(config.model_fields)
    for key in values:
        if key not in known:
            raise ConfigError(_unknown(plugin, key, known), key=key)
    chosen = {key: None if _means_none(config, key, value) else value for key, value in values.items()}
    failing = {str(e["loc"][0]) for e in _errors(config, chosen) if e["loc"]}
    for key in failing:
        if isinstance(text := chosen.get(key), str):
            chosen[key] = _typed(text)
    try:
        return config.model_validate(chosen)
    except ValidationError as error:
        raise ConfigError(f"{plugin}: {first_problem(error)}", key=_first_key(error)) from None


def resolved(config: PluginConfig) -> dict[str, Any]:
    """Every setting with its value, as data that TOML can say and `configure` reads back."""
    values = config.model_dump(mode="json")
    defaults = type(config)().model_dump(mode="json")
    return {k: "none" if v is None else v for k, v in values.items() if v is not None or defaults[k] is not None}


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line: key, what is wrong, what was given."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "settings"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if isinstance(given, dict | BaseModel) else f", got {given!r}"
    return f"{where}: {message}{shown}"


def describe_config(config: type[PluginConfig]) -> list[dict[str, Any]]:
    """One row per setting: key, type, default, bounds, meaning, as plain data."""
    properties = config.model_json_schema().get("properties", {})
    rows = []
    for key, field in config.model_fields.items():
        schema = properties.get(key, {})
        rows.append(
            {
                "key": key,
                "type": _type_text(schema, field.annotation),
                "default": field.get_default(call_default_factory=True),
                "bounds": _bounds_text(schema),
                "meaning": " ".join((field.description or "").split()),
            }
        )
    return rows


def _errors(config: type[PluginConfig], values: Mapping[str, Any]) -> Sequence[Any]:
    try:
        config.model_validate(values)
    except ValidationError as error:
        return error.errors()
    return ()


def _means_none(config: type[PluginConfig], key: str, value: Any) -> bool:
    """Whether `none` is the absence of this setting: it may be absent, and has no choice of that name."""
    if not isinstance(value, str) or value.lower() not in _ABSENT:
        return False
    choices = get_args(config.model_fields[key].annotation)
    return type(None) in choices and not any(value in get_args(choice) for choice in choices)


def _typed(text: str) -> Any:
    """Text that pydantic does not take as it is, read as TOML: lists, tables."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return [part.strip() for part in text.split(",")] if "," in text else text


def _unknown(plugin: str, key: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(key, sorted(known), n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in nearest)}?" if nearest else ""
    listed = ", ".join(sorted(known)) or "none, it has no settings"
    return f"{plugin} has no setting {key!r}.{hint} Settings: {listed}."


def _first_key(error: ValidationError) -> str | None:
    loc = error.errors()[0]["loc"]
    return str(loc[0]) if loc else None


def _type_text(schema: Mapping[str, Any], annotation: Any) -> str:
    if "enum" in schema:
        return " | ".join(str(v) for v in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(_type_text(part, annotation) for part in schema["anyOf"])
    kind = schema.get("type")
    if kind == "null":
        return "none"
    if kind == "array":
        return f"list of {_type_text(schema.get('items', {}), annotation)}"
    return str(kind) if kind else getattr(annotation, "__name__", str(annotation))


def _bounds_text(schema: Mapping[str, Any]) -> str:
    names = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    parts = [schema, *schema.get("anyOf", ())]
    return ", ".join(f"{sign} {part[key]:g}" for part in parts for key, sign in names.items() if key in part)
