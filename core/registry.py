"""Which plugins, estimators and adapters there are, and where each comes from.

Three sources: the `registry.toml` that ships with the package, entry points of installed packages
(groups `prunus.plugins`, `prunus.importance`, `prunus.adapters`), and registry files the user names.
Nothing is imported until it is used. One broken entry never breaks another.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunus.core.adapter import OpenSession
from prunus.core.errors import (
    ConfigError,
    DuplicateNameError,
    MissingDependencyError,
    PluginError,
    PrunusError,
    UnknownNameError,
)
from prunus.core.importance import ImportanceEstimator, PluginConfig
from prunus.core.policy import PruningPolicy
from prunus.core.signals import Signal

Kind = Literal["plugins", "importance", "adapters"]
KINDS: tuple[Kind, ...] = ("adapters", "importance", "plugins")
NOUNS: dict[Kind, str] = {"adapters": "adapter", "importance": "importance estimator", "plugins": "plugin"}
BUILT_IN = Path(__file__).resolve().parents[1] / "registry.toml"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_TARGET = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


_COMMAND_LINE = "the command line"
"""The source of names that are no entry anywhere."""


class WrongTargetError(PluginError, ConfigError):
    """What the user wrote as package.module:Object leads to nothing of that kind: the call is wrong."""

    def __init__(self, kind: Kind, name: str, rule: str, detail: str) -> None:
        ConfigError.__init__(self, f"{NOUNS[kind]} {name!r}: {rule}. {detail}", key=kind)
        self.plugin, self.rule = name, rule


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered name."""

    kind: Kind
    name: str
    target: str
    """package.module:Object"""
    summary: str
    install: str
    """Command that installs what the target imports."""
    source: str
    """Where the entry was found, in words: "built-in", "package foo 1.2", "file my.toml"."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")
    target: str = Field(pattern=_TARGET, max_length=512)
    summary: str = Field(default="", max_length=1024)
    install: str = Field(default="", max_length=1024)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    adapters: dict[str, _Row] = Field(default_factory=dict)
    importance: dict[str, _Row] = Field(default_factory=dict)
    plugins: dict[str, _Row] = Field(default_factory=dict)


class Registry:
    """All entries by kind and name. A name that two sources claim is kept, and refused when it is used."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries: dict[tuple[Kind, str], list[Entry]] = {}
        for entry in entries:
            claimed = self._entries.setdefault((entry.kind, entry.name), [])
            if all(entry.target != other.target for other in claimed):
                claimed.append(entry)

    @classmethod
    def discover(cls, files: Iterable[Path] = ()) -> Registry:
        """The built-ins, installed packages' entry points, and `files`. Raises ConfigError for a bad file."""
        entries = list(read_file(BUILT_IN, source="built-in"))
        entries += _entry_points()
        for file in files:
            entries += read_file(file, source=f"file {file}")
        return cls(entries)

    def entries(self, kind: Kind) -> tuple[Entry, ...]:
        """All entries of a kind, sorted by name; the several claims on one name follow each other."""
        keys = sorted(key for key in self._entries if key[0] == kind)
        return tuple(entry for key in keys for entry in self._entries[key])

    def names(self, kind: Kind) -> tuple[str, ...]:
        return tuple(sorted(name for k, name in self._entries if k == kind))

    def entry(self, kind: Kind, name: str) -> Entry:
        """The entry of that name; `package.module:Object` is an entry by itself.

        Raises UnknownNameError with the nearest names, DuplicateNameError naming both sources.
        """
        if ":" in name:
            if not re.fullmatch(_TARGET, name):
                raise ConfigError(f"{NOUNS[kind]} {name!r}: write it as package.module:Class", key=kind)
            return Entry(kind, name, name, "", "", _COMMAND_LINE)
        claimed = self._entries.get((kind, name), [])
        if not claimed:
            raise UnknownNameError(NOUNS[kind], name, self.names(kind))
        if len(claimed) > 1:
            raise DuplicateNameError(NOUNS[kind], name, claimed[0].source, claimed[1].source)
        return claimed[0]

    def policy(self, name: str) -> type[PruningPolicy]:
        """The policy class. Raises PluginError naming the plugin and the rule it breaks.

        Where the name itself is wrong that is a ConfigError, too.
        """
        return check_policy(name, self._class("plugins", name, PruningPolicy))

    def estimator(self, name: str) -> type[ImportanceEstimator]:
        """The estimator class. Raises PluginError naming the plugin and the rule it breaks.

        Where the name itself is wrong that is a ConfigError, too.
        """
        return check_estimator(name, self._class("importance", name, ImportanceEstimator))

    def _class(self, kind: Kind, name: str, base: type) -> object:
        entry = self.entry(kind, name)
        found = load_target(entry)
        wrong = _wrong_kind(found, base)
        if wrong is not None:
            raise _fault(entry, *wrong)
        return found

    def adapter(self, name: str) -> OpenSession:
        """The function that opens a session."""
        entry = self.entry("adapters", name)
        found = load_target(entry)
        if not callable(found):
            rule = "an adapter's target must be a function that opens a session"
            raise _fault(entry, rule, f"It is {type(found).__name__}.")
        return cast("OpenSession", found)

    def broken(self, entry: Entry) -> str | None:
        """Why the entry cannot be used, in one line; None if it can. Imports it."""
        check: dict[Kind, Callable[[str], object]] = {
            "plugins": self.policy,
            "importance": self.estimator,
            "adapters": self.adapter,
        }
        try:
            check[entry.kind](entry.name)
        except PrunusError as error:
            return str(error)
        return None


def read_file(path: Path, source: str) -> tuple[Entry, ...]:
    """The entries of one registry file. Raises ConfigError naming the file and what is wrong in it."""
    try:
        parsed = _File.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise ConfigError(f"registry file {path} cannot be read: {error.strerror}", key="registry") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"registry file {path}, {where}: {first['msg']}", key="registry") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"registry file {path} is not TOML: {str(error)[:200]}", key="registry") from None
    tables: dict[Kind, dict[str, _Row]] = {
        "adapters": parsed.adapters,
        "importance": parsed.importance,
        "plugins": parsed.plugins,
    }
    entries = []
    for kind, rows in tables.items():
        for name, row in rows.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"registry file {path}: name {name!r} must be small letters, digits, '.', '_' or '-'", key=name
                )
            entries.append(Entry(kind, name, row.target, row.summary, row.install, source))
    return tuple(entries)


def _entry_points() -> list[Entry]:
    entries = []
    for kind in KINDS:
        for point in importlib.metadata.entry_points(group=f"prunus.{kind}"):
            package = point.dist
            source = f"package {package.name} {package.version}" if package else "an entry point"
            install = f"pip install {package.name}" if package else ""
            summary = (package.metadata["Summary"] or "") if package else ""
            entries.append(Entry(kind, point.name, point.value, summary, install, source))
    return entries


def _fault(entry: Entry, rule: str, detail: str) -> PluginError:
    """What an entry leads to is not there or no such thing: its author's fault, or the user's who wrote it."""
    if entry.source == _COMMAND_LINE:
        return WrongTargetError(entry.kind, entry.name, rule, detail)
    return PluginError(entry.name, rule, detail)


def load_target(entry: Entry) -> Any:
    """Import what an entry names.

    Raises MissingDependencyError if the target's module needs a package that is not installed, PluginError if
    the module or the object in it is not there (WrongTargetError where the user wrote the target) or cannot be
    imported.
    """
    module_name, _, attribute = entry.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            detail = f"No module {missing!r} ({entry.target}, from {entry.source})."
            raise _fault(entry, "its module must exist", detail) from error
        if missing.partition(".")[0] == module_name.partition(".")[0]:
            raise PluginError(
                entry.name, "its modules must exist", f"{module_name} imports {missing!r}, which is not there."
            ) from error
        what = f"{NOUNS[entry.kind]} {entry.name!r} (module {missing!r})"
        raise MissingDependencyError(what, entry.install or f"pip install {missing.partition('.')[0]}") from error
    except PrunusError:
        raise
    except (Exception, SystemExit) as error:
        detail = f"{type(error).__name__}: {_one_line(error)} ({entry.target}, from {entry.source})"
        raise PluginError(entry.name, "it must import without an error", detail) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        detail = f"Module {module_name} has no {attribute!r} (from {entry.source})."
        raise _fault(entry, "its target must exist", detail) from None


def check_policy(name: str, found: object) -> type[PruningPolicy]:
    """`found` if it is a usable policy class, else PluginError."""
    _check_class(name, found, PruningPolicy)
    policy = cast("type[PruningPolicy]", found)
    if policy.starts_from not in ("trained", "scratch"):
        raise PluginError(name, "starts_from must be 'trained' or 'scratch'", f"It is {policy.starts_from!r}.")
    _check_needs(name, policy.needs)
    _check_config(name, policy, policy.Config)
    return policy


def check_estimator(name: str, found: object) -> type[ImportanceEstimator]:
    """`found` if it is a usable estimator class, else PluginError."""
    _check_class(name, found, ImportanceEstimator)
    estimator = cast("type[ImportanceEstimator]", found)
    if not hasattr(estimator, "needs"):
        raise PluginError(name, "an estimator must declare `needs`, the signals it reads")
    _check_needs(name, estimator.needs)
    _check_config(name, estimator, estimator.Config)
    return estimator


def _wrong_kind(found: object, base: type) -> tuple[str, str] | None:
    """Rule and detail where `found` is no class made from `base`."""
    if not inspect.isclass(found):
        return "its target must be a class", f"It is {type(found).__name__}."
    if not issubclass(found, base):
        return f"it must derive from prunus.core.{base.__name__}", f"{found.__name__} does not."
    return None


def _check_class(name: str, found: object, base: type) -> None:
    wrong = _wrong_kind(found, base)
    if wrong is not None:
        raise PluginError(name, *wrong)
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise PluginError(name, "it must define every abstract method", f"Missing: {missing}.")


def _check_needs(name: str, needs: object) -> None:
    if not isinstance(needs, frozenset) or not all(isinstance(signal, Signal) for signal in needs):
        raise PluginError(name, "needs must be a frozenset of prunus.core.Signal", f"It is {needs!r}.")


def _check_config(name: str, cls: Callable[[PluginConfig], object], config: object) -> None:
    if not inspect.isclass(config) or not issubclass(config, PluginConfig):
        raise PluginError(name, "its Config must derive from prunus.core.PluginConfig", f"It is {config!r}.")
    for setting, wanted in (("extra", "forbid"), ("frozen", True)):
        if config.model_config.get(setting) != wanted:
            raise PluginError(
                name, f"its Config must have {setting}={wanted!r}", f"It has {config.model_config.get(setting)!r}."
            )
    try:
        defaults = config()
    except ValidationError as error:
        keys = ", ".join(str(e["loc"][0]) for e in error.errors() if e["loc"])
        raise PluginError(name, "every setting in its Config must have a valid default", f"See: {keys}.") from None
    try:
        cls(defaults)
    except Exception as error:
        detail = f"{type(error).__name__}: {_one_line(error)}"
        raise PluginError(name, "it must be constructible from its default Config", detail) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300]
