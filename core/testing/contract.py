"""The contract kit: what every estimator and every policy must keep, as rules that name themselves.

From the command line: `optimize plugins check NAME`. In a package's own tests: subclass `ImportanceContract`
or `PolicyContract` and override one fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from prunus.core.errors import PluginError, PrunusError
from prunus.core.importance import ImportanceEstimator
from prunus.core.policy import PruningPolicy
from prunus.core.testing.importance_rules import IMPORTANCE_RULES
from prunus.core.testing.policy_rules import POLICY_RULES

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Result:
    """One rule: kept if `problem` is None."""

    rule: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class Rule(Generic[T]):
    """A sentence about a plugin, and the function that raises where it does not hold."""

    text: str
    check: Callable[[type[T], str], None]


def check_estimator_contract(estimator: type[ImportanceEstimator], name: str) -> list[Result]:
    """Every rule for estimators, tried on `estimator`; `name` is what messages call it."""
    return _check([Rule(text, rule) for text, rule in IMPORTANCE_RULES.items()], estimator, name)


def check_policy_contract(policy: type[PruningPolicy], name: str) -> list[Result]:
    """Every rule for policies, tried on `policy`; `name` is what messages call it."""
    return _check([Rule(text, rule) for text, rule in POLICY_RULES.items()], policy, name)


def enforce(rule: Rule[T], plugin: type[T], name: str) -> None:
    """Raises PluginError naming plugin and rule if it does not hold, whatever the plugin raised."""
    try:
        rule.check(plugin, name)
    except PluginError:
        raise
    except Exception as error:
        said = str(error) if isinstance(error, PrunusError) else f"{type(error).__name__}: {error}"
        raise PluginError(name, rule.text, " ".join(said.split())[:400]) from error


def _check(rules: Sequence[Rule[T]], plugin: type[T], name: str) -> list[Result]:
    results = []
    for rule in rules:
        try:
            enforce(rule, plugin, name)
        except PluginError as error:
            results.append(Result(rule.text, str(error)))
        else:
            results.append(Result(rule.text, None))
    return results
