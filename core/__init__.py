"""The language of pruning. Authors of methods, estimators and adapters import everything from here.

Names are imported when they are first used, so that a command's help needs none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.core.adapter import Description, ModelAdapter, OpenSession, Session, Watcher
    from prunus.core.blocks import Block
    from prunus.core.budget import Budget, Target
    from prunus.core.cost import Cost, CostTerm, Extent, FloatArray, IntArray
    from prunus.core.directives import (
        Changed,
        Directive,
        Distillation,
        Evaluate,
        Evaluated,
        Gates,
        Grow,
        Measure,
        Merge,
        Note,
        Observation,
        Remove,
        Snapshot,
        Train,
        Trained,
        Verification,
    )
    from prunus.core.errors import (
        ConfigError,
        DuplicateNameError,
        JournalError,
        LoadError,
        MissingDependencyError,
        PlanError,
        PluginError,
        PrunusError,
        RunExistsError,
        TraceError,
        TrainingError,
        UnknownNameError,
        UnreachableTargetError,
        VerificationError,
    )
    from prunus.core.graph import ChannelGraph, ChannelGroup, Keep, Slice
    from prunus.core.growth import Growth
    from prunus.core.importance import ImportanceEstimator, PluginConfig
    from prunus.core.kernels import Kernel
    from prunus.core.plan import AttributeEdit, Branching, ModelSource, PruningPlan
    from prunus.core.policy import PruningPolicy, PruningTask
    from prunus.core.registry import Registry
    from prunus.core.settings import RunSettings
    from prunus.core.signals import Signal, SignalReader

_HOME = {
    "AttributeEdit": "plan",
    "Block": "blocks",
    "Branching": "plan",
    "Budget": "budget",
    "Changed": "directives",
    "ChannelGraph": "graph",
    "ChannelGroup": "graph",
    "ConfigError": "errors",
    "Cost": "cost",
    "CostTerm": "cost",
    "Description": "adapter",
    "Directive": "directives",
    "Distillation": "directives",
    "DuplicateNameError": "errors",
    "Evaluate": "directives",
    "Evaluated": "directives",
    "Extent": "cost",
    "FloatArray": "cost",
    "Gates": "directives",
    "Grow": "directives",
    "Growth": "growth",
    "ImportanceEstimator": "importance",
    "IntArray": "cost",
    "JournalError": "errors",
    "Keep": "graph",
    "Kernel": "kernels",
    "LoadError": "errors",
    "Measure": "directives",
    "Merge": "directives",
    "MissingDependencyError": "errors",
    "ModelAdapter": "adapter",
    "ModelSource": "plan",
    "Note": "directives",
    "Observation": "directives",
    "OpenSession": "adapter",
    "PlanError": "errors",
    "PluginConfig": "importance",
    "PluginError": "errors",
    "PruningPlan": "plan",
    "PruningPolicy": "policy",
    "PruningTask": "policy",
    "PrunusError": "errors",
    "Registry": "registry",
    "Remove": "directives",
    "RunExistsError": "errors",
    "RunSettings": "settings",
    "Session": "adapter",
    "Signal": "signals",
    "SignalReader": "signals",
    "Slice": "graph",
    "Snapshot": "directives",
    "Target": "budget",
    "TraceError": "errors",
    "Train": "directives",
    "Trained": "directives",
    "TrainingError": "errors",
    "UnknownNameError": "errors",
    "UnreachableTargetError": "errors",
    "Verification": "directives",
    "VerificationError": "errors",
    "Watcher": "adapter",
}

__all__ = [
    "AttributeEdit",
    "Block",
    "Branching",
    "Budget",
    "Changed",
    "ChannelGraph",
    "ChannelGroup",
    "ConfigError",
    "Cost",
    "CostTerm",
    "Description",
    "Directive",
    "Distillation",
    "DuplicateNameError",
    "Evaluate",
    "Evaluated",
    "Extent",
    "FloatArray",
    "Gates",
    "Grow",
    "Growth",
    "ImportanceEstimator",
    "IntArray",
    "JournalError",
    "Keep",
    "Kernel",
    "LoadError",
    "Measure",
    "Merge",
    "MissingDependencyError",
    "ModelAdapter",
    "ModelSource",
    "Note",
    "Observation",
    "OpenSession",
    "PlanError",
    "PluginConfig",
    "PluginError",
    "PruningPlan",
    "PruningPolicy",
    "PruningTask",
    "PrunusError",
    "Registry",
    "Remove",
    "RunExistsError",
    "RunSettings",
    "Session",
    "Signal",
    "SignalReader",
    "Slice",
    "Snapshot",
    "Target",
    "TraceError",
    "Train",
    "Trained",
    "TrainingError",
    "UnknownNameError",
    "UnreachableTargetError",
    "Verification",
    "VerificationError",
    "Watcher",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"prunus.core.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
