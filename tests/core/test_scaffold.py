"""A scaffolded package works as it is: installed, listed with its origin, checked, and used."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from prunus.core.errors import ConfigError
from prunus.core.registry import Registry
from prunus.core.scaffold import Offer, scaffold
from prunus.core.testing.contract import check_estimator_contract, check_policy_contract


@pytest.mark.parametrize("offer", ["importance", "plugins"])
def test_the_scaffolded_class_keeps_every_rule(
    offer: Offer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaffold(f"my-{offer}", offer, tmp_path / "package")
    monkeypatch.syspath_prepend(str(tmp_path / "package"))
    project = tomllib.loads((tmp_path / "package" / "pyproject.toml").read_text())
    target = project["project"]["entry-points"][f"prunus.{offer}"][f"my-{offer}"]
    if offer == "importance":
        results = check_estimator_contract(Registry([]).estimator(target), "mine")
    else:
        results = check_policy_contract(Registry([]).policy(target), "mine")
    assert [r.problem for r in results if r.problem] == []


def test_the_scaffolded_test_runs_the_kit(tmp_path: Path) -> None:
    scaffold("mine", "importance", tmp_path / "package")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    folder = tmp_path / "package"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert "5 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("name", ["Mine", "a b", "../x", "", "1st", "a--b", "-a"])
def test_a_name_that_is_no_package_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be small letters"):
        scaffold(name, "importance", tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("here")
    with pytest.raises(ConfigError, match="not an empty folder"):
        scaffold("mine", "importance", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_wheel_of_it_is_found_checked_and_used_without_touching_this_repository(tmp_path: Path) -> None:
    """In a folder of installed packages of its own, put before the others."""
    scaffold("stranger", "plugins", tmp_path / "package")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(tmp_path / "package")], check=True)
    start = f"import sys; sys.path.insert(0, {str(site)!r}); from prunus.core.cli import main; main()"

    def optimize(*words: str) -> str:
        command = [sys.executable, "-c", start, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "package prunus-stranger 0.1.0" in optimize("plugins", "list", "--json")
    assert "9 of 9 rules kept" in optimize("plugins", "check", "stranger")
    assert '"target_met": true' in optimize(
        "prune", "--plugin", "stranger", "--model", "prunus/resnet14", "--data", "none", "--json"
    )
