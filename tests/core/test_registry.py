"""Names lead to classes; what is broken says so by name and breaks nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prunus.core.errors import (
    ConfigError,
    DuplicateNameError,
    MissingDependencyError,
    PluginError,
    UnknownNameError,
)
from prunus.core.registry import BUILT_IN, Entry, Registry, read_file
from prunus.plugins.magnitude import Magnitude
from prunus.plugins.one_shot import OneShot

Package = Callable[[str, str], None]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Write a module that can be imported during the test."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)

    return write


def _file(folder: Path, text: str) -> Path:
    path = folder / "registry.toml"
    path.write_text(text)
    return path


def test_built_in_names_lead_to_their_classes() -> None:
    registry = Registry.discover()
    assert registry.policy("one-shot") is OneShot
    assert registry.estimator("magnitude") is Magnitude


def test_a_direct_target_needs_no_registration() -> None:
    assert Registry([]).policy("prunus.plugins.one_shot:OneShot") is OneShot


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"No plugin named 'gsm-aneal'\. Did you mean 'gsm-anneal'"):
        Registry.discover().policy("gsm-aneal")


@pytest.mark.parametrize("target", ["os.path:", ":Class", "a b:C", "module:a.b", "x:y:z"])
def test_a_malformed_target_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"package\.module:Class"):
        Registry([]).policy(target)


def test_entries_are_listed_sorted_without_importing_them() -> None:
    sys.modules.pop("prunus.plugins.fpgm", None)
    registry = Registry.discover()
    names = [entry.name for entry in registry.entries("importance")]
    assert names == sorted(names)
    assert "prunus.plugins.fpgm" not in sys.modules


def test_two_sources_of_one_name_are_both_named_and_the_others_work(tmp_path: Path) -> None:
    file = _file(tmp_path, '[plugins.one-shot]\ntarget = "elsewhere:OneShot"\n')
    registry = Registry.discover([file])
    with pytest.raises(DuplicateNameError, match="one from built-in, one from file") as caught:
        registry.policy("one-shot")
    assert str(file) in str(caught.value)
    assert len([e for e in registry.entries("plugins") if e.name == "one-shot"]) == 2
    assert registry.policy("iterative")


def test_one_target_found_twice_is_one_entry() -> None:
    entry = Entry("plugins", "x", "a:B", "", "", "package a 1")
    again = Entry("plugins", "x", "a:B", "", "", "package a 1 (another folder)")
    assert len(Registry([entry, again]).entries("plugins")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plugins.x]\nsummary = 'no target'\n", "plugins.x.target: Field required"),
        ("[plugins.x]\ntarget = 'no colon'\n", "plugins.x.target"),
        ("[plugins.x]\ntarget = 'a:B'\ncode = 'rm'\n", "plugins.x.code"),
        ("[plugin.x]\ntarget = 'a:B'\n", "plugin: Extra inputs"),
        ("[plugins.'../x']\ntarget = 'a:B'\n", "must be small letters"),
        ("not toml", "is not TOML"),
    ],
)
def test_a_wrong_registry_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = _file(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        Registry.discover([file])
    assert str(file) in str(caught.value)


def test_a_missing_registry_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_file(tmp_path / "none.toml", "here")


BROKEN = {
    "raises": ("raise RuntimeError('at import')", "it must import without an error", "RuntimeError: at import"),
    "leaves": ("import sys; sys.exit(3)", "it must import without an error", "SystemExit: 3"),
    "syntax": ("def f(:", "it must import without an error", "SyntaxError"),
    "lacks": ("other = 1", "its target must exist", "has no 'Plugin'"),
    "function": ("def Plugin(): pass", "its target must be a class", "It is function"),
    "wrong_base": ("class Plugin: pass", "it must derive from prunus.core.PruningPolicy", "Plugin does not"),
    "abstract": (
        "from prunus.core import PruningPolicy\nclass Plugin(PruningPolicy): pass",
        "it must define every abstract method",
        "run",
    ),
    "start": (
        "from prunus.core import PruningPolicy\nclass Plugin(PruningPolicy):\n"
        "    starts_from = 'anywhere'\n    def run(self, task): yield",
        "starts_from must be 'trained' or 'scratch'",
        "anywhere",
    ),
    "needs": (
        "from prunus.core import PruningPolicy\nclass Plugin(PruningPolicy):\n"
        "    needs = ['weight']\n    def run(self, task): yield",
        "needs must be a frozenset",
        "weight",
    ),
    "config": (
        "from prunus.core import PruningPolicy\nclass Plugin(PruningPolicy):\n"
        "    Config = dict\n    def run(self, task): yield",
        "its Config must derive from prunus.core.PluginConfig",
        "dict",
    ),
    "init": (
        "from prunus.core import PruningPolicy\nclass Plugin(PruningPolicy):\n"
        "    def __init__(self): pass\n    def run(self, task): yield",
        "it must be constructible from its default Config",
        "TypeError",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_listed_with_its_error_and_the_others_work(
    fault: str, module: Package, tmp_path: Path
) -> None:
    text, rule, detail = BROKEN[fault]
    module(f"faulty_{fault}", text)
    registry = Registry.discover([_file(tmp_path, f"[plugins.faulty]\ntarget = 'faulty_{fault}:Plugin'\n")])
    with pytest.raises(PluginError) as caught:
        registry.policy("faulty")
    assert caught.value.plugin == "faulty"
    assert rule in caught.value.rule
    assert detail in str(caught.value)
    assert registry.broken(registry.entry("plugins", "faulty")) == str(caught.value)
    assert registry.broken(registry.entry("plugins", "one-shot")) is None


def test_a_missing_dependency_tells_what_to_install(module: Package, tmp_path: Path) -> None:
    module("needy", "import a_package_that_is_not_there")
    text = "[plugins.needy]\ntarget = 'needy:Plugin'\ninstall = 'pip install needy[all]'\n"
    with pytest.raises(MissingDependencyError, match=r"pip install needy\[all\]"):
        Registry.discover([_file(tmp_path, text)]).policy("needy")


def test_a_missing_module_of_the_plugin_is_its_own_fault(module: Package) -> None:
    with pytest.raises(PluginError, match="its module must exist"):
        Registry([]).policy("nowhere_at_all:Plugin")
    with pytest.raises(PluginError, match="its module must exist"):
        Registry([]).policy("prunus.plugins.no_such_method:Plugin")


def test_entry_points_are_found_with_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "strange_pruning-3.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: strange-pruning\nVersion: 3.2\nSummary: Prunes.\n"
    )
    (info / "entry_points.txt").write_text("[prunus.importance]\nstrange = prunus.plugins.magnitude:Magnitude\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    registry = Registry.discover()
    entry = registry.entry("importance", "strange")
    assert (entry.source, entry.summary) == ("package strange-pruning 3.2", "Prunes.")
    assert registry.estimator("strange") is Magnitude


def test_the_shipped_file_is_sorted_and_complete() -> None:
    entries = read_file(BUILT_IN, "built-in")
    assert [(e.kind, e.name) for e in entries] == sorted((e.kind, e.name) for e in entries)
    assert all(e.summary and e.install for e in entries)
