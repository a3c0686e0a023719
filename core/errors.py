"""Every error this product raises on purpose.

    PrunusError                     exit 1
    ├── ConfigError                 exit 2   the call, a config or a file of it is wrong
    │   ├── UnknownNameError                 a name is not registered; carries the nearest ones
    │   ├── DuplicateNameError               two packages register one name
    │   └── RunExistsError                   the output folder holds a run already
    ├── PlanError                   exit 2   a plan breaks a rule of its graph
    ├── UnreachableTargetError      exit 3   no allowed plan meets the target; carries the smallest reachable
    ├── LoadError                   exit 4   model, data or checkpoint cannot be loaded
    │   └── MissingDependencyError           an optional package is not installed
    ├── TraceError                  exit 4   a model cannot be traced
    ├── VerificationError           exit 5   masked and pruned outputs differ
    ├── TrainingError               exit 1   NaN or infinity while training
    ├── JournalError                exit 1   a run folder is damaged, foreign or in use
    ├── ProcessError                exit 1   another process of the job has ended, or holds another plan
    └── PluginError                 exit 1   the plugin is at fault, not the user; names plugin and rule

A message says what is wrong, the value it got, and what is allowed or what to do next. The facts ride
along as attributes, so that nobody parses text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class PrunusError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class ConfigError(PrunusError, ValueError):
    exit_code = 2

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class UnknownNameError(ConfigError):
    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        self.nearest = tuple(difflib.get_close_matches(name, self.known, n=3, cutoff=0.5))
        hint = f" Did you mean {' or '.join(repr(n) for n in self.nearest)}?" if self.nearest else ""
        shown = ", ".join(self.known[:20]) + (", ..." if len(self.known) > 20 else "")
        super().__init__(f"No {kind} named {name!r}.{hint} Known: {shown}.")


class DuplicateNameError(ConfigError):
    def __init__(self, kind: str, name: str, first: str, second: str) -> None:
        self.kind, self.name, self.sources = kind, name, (first, second)
        super().__init__(f"Two {kind}s are named {name!r}: one from {first}, one from {second}. Uninstall one.")


class RunExistsError(ConfigError):
    def __init__(self, folder: str) -> None:
        self.folder = folder
        super().__init__(f"{folder} holds a run already. Continue it with --resume {folder}, or pass --overwrite.")


class PlanError(PrunusError, ValueError):
    exit_code = 2

    def __init__(self, message: str, *, group: str | None = None) -> None:
        super().__init__(message)
        self.group = group


class UnreachableTargetError(PrunusError, ValueError):
    exit_code = 3

    def __init__(self, target: str, smallest: str, why: str) -> None:
        self.target, self.smallest = target, smallest
        super().__init__(f"Target {target} cannot be reached: the smallest reachable is {smallest} ({why}).")


class LoadError(PrunusError):
    exit_code = 4


class MissingDependencyError(LoadError, ImportError):
    def __init__(self, what: str, install: str) -> None:
        self.install = install
        super().__init__(f"{what} needs a package that is not installed. Run: {install}")


class TraceError(PrunusError):
    exit_code = 4

    def __init__(self, message: str, *, node: str | None = None, locks: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.node = node
        self.locks = dict(locks or {})
        """Groups at fault -> why they must stay whole, where that is known."""


class VerificationError(PrunusError):
    exit_code = 5

    def __init__(self, message: str, *, max_error: float, scale: float) -> None:
        super().__init__(message)
        self.max_error, self.scale = max_error, scale


class TrainingError(PrunusError):
    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class JournalError(PrunusError):
    pass


class ProcessError(PrunusError):
    pass


class PluginError(PrunusError):
    """The plugin broke its contract."""

    def __init__(self, plugin: str, rule: str, detail: str = "") -> None:
        self.plugin, self.rule = plugin, rule
        super().__init__(f"Plugin {plugin!r} broke a rule: {rule}." + (f" {detail}" if detail else ""))
