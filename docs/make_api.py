"""Writes docs/api.md from the docstrings: `python docs/make_api.py`. A test checks that it is current."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
PARTS = {
    "prunus.adapters.pytorch": "For users: prune, load and trace models, or prune inside a loop of your own.",
    "prunus.core": "For authors of methods, estimators and adapters.",
    "prunus.core.allocation": "Counts that meet a budget, for policies.",
    "prunus.core.testing.contract": "The contract kit, as functions.",
    "prunus.core.testing.importance_contract": "The contract kit for estimators, as tests.",
    "prunus.core.testing.policy_contract": "The contract kit for policies, as tests.",
    "prunus.core.testing.adapter_contract": "The contract kit for adapters, as tests.",
}


def api_text() -> str:
    """The page: one section per module, one entry per public name."""
    lines = ["# API", "", "Made from the docstrings by `docs/make_api.py`.", ""]
    for name, about in PARTS.items():
        module = importlib.import_module(name)
        lines += [f"## {name}", "", about, ""]
        for public in _public(module):
            lines += _entry(public, getattr(module, public))
    return "\n".join(lines).rstrip() + "\n"


def _public(module: Any) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed)
    own = inspect.getmembers(module, lambda x: inspect.isclass(x) or inspect.isfunction(x))
    return sorted(n for n, x in own if x.__module__ == module.__name__ and not n.startswith("_"))


def _entry(name: str, value: Any) -> list[str]:
    if inspect.isclass(value):
        return [f"### {name}", "", *_doc(value), *_fields(value), *_methods(value)]
    if inspect.isfunction(value):
        return [f"### {name}", "", *_code(f"{name}{_signature(value)}"), *_doc(value)]
    return [f"### {name}", "", *_code(f"{name} = {_alias(value)}")]


def _alias(value: Any) -> str:
    return str(value).replace("typing.", "").replace("collections.abc.", "")


def _code(text: str) -> list[str]:
    return ["```text", text, "```", ""]


def _doc(value: Any) -> list[str]:
    text = inspect.cleandoc(value.__doc__) if value.__doc__ else ""
    return [text, ""] if text else []


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    parts: list[str] = []
    bare = False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not bare:
            parts.append("*")
        bare = bare or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        parts.append(_parameter(parameter))
    answer = "" if signature.return_annotation is signature.empty else f" -> {_text(signature.return_annotation)}"
    line = f"({', '.join(parts)}){answer}"
    return line if len(line) <= 90 else "(\n    " + ",\n    ".join(parts) + f",\n){answer}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    typed = "" if parameter.annotation is parameter.empty else f": {_text(parameter.annotation)}"
    default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
    return f"{stars}{parameter.name}{typed}{default}"


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _methods(cls: type) -> list[str]:
    lines = []
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        lines += [f"**{name}**", "", *_code(f"{name}{_signature(function)}"), *_doc(function)]
    for name, member in vars(cls).items():
        if isinstance(member, property) and member.__doc__ and not name.startswith("_"):
            lines += [f"**{name}** (property): {' '.join(inspect.cleandoc(member.__doc__).split())}", ""]
    return lines


def _fields(cls: type) -> list[str]:
    """A list of the annotated fields, each with the sentence under it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return []
    body = tree.body[0]
    assert isinstance(body, ast.ClassDef)
    lines = [f"- `{name}`{': ' + about if about else ''}" for name, about in _annotated(body)]
    return [*lines, ""] if lines else []


def _annotated(body: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if statement.target.id.startswith("_"):
            continue
        about = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            about = " ".join(str(following.value.value).split())
        default = f" = {ast.unparse(statement.value)}" if statement.value is not None else ""
        yield f"{statement.target.id}: {ast.unparse(statement.annotation)}{default}", about


if __name__ == "__main__":
    PAGE.write_text(api_text(), "utf-8")
