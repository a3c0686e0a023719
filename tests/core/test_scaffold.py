"""A scaffolded package works as it is: installed, listed with its origin, checked, and used."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
from importlib.util import find_spec
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
@pytest.mark.parametrize("kind", ["plugins", "importance"])
def test_a_wheel_of_it_is_found_checked_and_used_in_a_fresh_environment(kind: str, tmp_path: Path) -> None:
    """The environment has its own site-packages; what this one has is found behind them."""
    scaffold("stranger", kind, tmp_path / "package")  # type: ignore[arg-type]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(tmp_path / "package")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    behind = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    behind.append(_place_of("prunus"))
    (site / "behind.pth").write_text("\n".join(behind) + "\n")

    def optimize(*words: str) -> str:
        command = [str(python), "-c", "from prunus.core.cli import main; main()", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "package prunus-stranger 0.1.0" in optimize("plugins", "list", "--json")
    assert "rules kept" in optimize("plugins", "check", "stranger")
    method = (
        ("--plugin", "stranger") if kind == "plugins" else ("--plugin", "one-shot", "--importance", "stranger")
    )
    done = optimize("prune", *method, "--model", "prunus/resnet14", "--data", "none", "--json")
    assert '"target_met": true' in done


def _place_of(package: str) -> str:
    """The folder from which `package`, a namespace, is imported."""
    spec = find_spec(f"{package}.core")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parents[2])
