"""A run as a folder for the hub: read in another process and place, it answers bit for bit like the run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunus.adapters.pytorch import hub
from prunus.adapters.pytorch.artifact import load
from prunus.adapters.pytorch.hub import CARD_FILE, CONFIG_FILE, from_pretrained, read_config
from prunus.core.cli import run
from prunus.core.errors import ConfigError, LoadError
from prunus.core.settings import make_settings

_NO_TRAINING = ("--epochs", "0", "--dense-epochs", "0")
_TINY = ("--data", "digits", "--train-limit", "100", "--batch-size", "25", "--dense-epochs", "1", "--epochs", "1")
RUNS = {
    "prunus": ("--model", "prunus/resnet8", "--plugin", "one-shot", "--data", "digits", *_NO_TRAINING),
    "timm": ("--model", "timm/test_vit", "--plugin", "one-shot", "--data", "none"),
    "torchvision": ("--model", "torchvision/shufflenet_v2_x0_5", "--plugin", "one-shot", "--data", "none"),
    "grown": ("--model", "prunus/resnet8", "--plugin", "gsm-anneal", "--set", "expansion=wide", *_TINY),
    "resized-head": ("--model", "timm/test_resnet", "--plugin", "one-shot", "--data", "digits", *_NO_TRAINING),
}
READER = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from prunus.adapters.pytorch import from_pretrained
for name in json.loads(sys.argv[1]):
    image = load_file(f"{name}/example.safetensors")["image"]
    with torch.no_grad():
        save_file({"output": from_pretrained(name)(image)}, f"{name}.safetensors")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("runs") / name
            words = ("prune", *RUNS[name], "--target", "macs=60%", "--threads", "1", "--output", str(folder))
            assert run([*words, "--json"]) == 0
            made[name] = folder
        return made[name]

    return give


def _exported(finished: Path, folder: Path) -> Path:
    assert run(["export", str(finished), "--format", "hub", "--output", str(folder), "--json"]) == 0
    return folder


def test_every_kind_of_model_answers_alike_from_its_folder_in_another_process_and_place(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    place = tmp_path / "elsewhere"
    expected = {}
    for name in RUNS:
        folder = _exported(finished(name), tmp_path / "first" / name)
        size = read_config(folder).input["size"]
        image = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected[name] = load(finished(name))(image)
        shutil.move(folder, place / name)
        save_file({"image": image}, place / name / "example.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", READER, json.dumps(list(RUNS))], cwd=place, env=environment, check=True, timeout=240
    )
    for name, output in expected.items():
        assert torch.equal(load_file(place / f"{name}.safetensors")["output"], output), name


def test_a_folder_holds_data_alone_and_a_second_export_replaces_it(
    finished: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = _exported(finished("prunus"), tmp_path / "hub")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    capfd.readouterr()
    _exported(finished("prunus"), folder)
    facts = json.loads(capfd.readouterr().out)
    assert (facts["file"], facts["format"], facts["max_error"]) == (str(folder), "hub", 0.0)
    assert {check["inputs"] for check in facts["checks"]} == {"random", "real"}
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert (config["architecture"], config["num_classes"]) == ("prunus/resnet8", 10)


def test_the_card_has_results_targets_proof_settings_and_limits(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    card = (_exported(finished("prunus"), tmp_path / "hub") / CARD_FILE).read_text()
    report = json.loads((finished("prunus") / "report.json").read_text())
    assert card.startswith('---\nlibrary_name: "prunus"\n')
    headings = re.findall(r"^## (.*)$", card, re.MULTILINE)
    assert headings == ["Results", "Use", "How it was made", "Limits"]
    for words in (
        "Target macs=60%: met.",
        "Verified: pruned and masked outputs differ by at most",
        f"{report['pruned']['accuracy']:.2%}",
        "from_pretrained(",
        "`digits` with 10 classes",
    ):
        assert words in card
    settings = make_settings(tomllib.loads(card.split("```toml\n")[1].split("```")[0]))
    assert (settings.model, settings.plugin, settings.targets) == ("prunus/resnet8", "one-shot", ("macs=60%",))


def test_a_folder_with_other_things_in_it_is_left_alone(finished: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run(["export", str(finished("prunus")), "--format", "hub", "--output", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def _refused(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    config = json.loads((folder / CONFIG_FILE).read_text())
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(LoadError) as caught:
        from_pretrained(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(library_name="transformers"), "is not a model of prunus"),
        (lambda c: c["prunus"].update(keep={"a": [3, 1]}), "strictly increasing"),
        (lambda c: c["prunus"]["model"].update(name="python:os:system"), "would run code"),
        (lambda c: c["prunus"]["model"].update(name="timm/../../etc/passwd"), "passwd"),
    ],
)
def test_a_folder_that_was_tampered_with_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    assert message in _refused(_exported(finished("prunus"), tmp_path / "hub"), change)


def test_what_is_neither_folder_nor_repository_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no model: config\.json is missing"):
        from_pretrained(tmp_path)
    with pytest.raises(LoadError, match="not OWNER/NAME of a repository"):
        from_pretrained("nowhere")


def test_a_hub_that_cannot_be_reached_is_one_clear_error(tmp_path: Path) -> None:
    code = "from prunus.adapters.pytorch import from_pretrained; from_pretrained('somebody/something')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "LoadError: no folder at 'somebody/something', and the hub does not give it" in last


class _RecordingApi:
    """Stands for the hub's client: the network is not part of the test."""

    calls: list[tuple[str, Any]]

    def __init__(self) -> None:
        type(self).calls = []

    def create_repo(self, repository: str, exist_ok: bool) -> None:
        self.calls.append((repository, exist_ok))

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        self.calls.append((repo_id, sorted(allow_patterns)))


def test_pushing_uploads_the_three_files_and_tells_the_address(
    finished: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    library = SimpleNamespace(HfApi=_RecordingApi, constants=SimpleNamespace(ENDPOINT="hub"))
    monkeypatch.setattr(hub, "_library", lambda: library)
    words = ["export", str(finished("prunus")), "--format", "hub", "--output", str(tmp_path / "hub")]
    assert run([*words, "--push", "me/small", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["address"] == "hub/me/small"
    files = ["README.md", "config.json", "model.safetensors"]
    assert _RecordingApi.calls == [("me/small", True), ("me/small", files)]


def test_pushing_needs_the_format_and_a_full_name(finished: Callable[[str], Path]) -> None:
    assert run(["export", str(finished("prunus")), "--push", "me/small"]) == 2
    assert run(["export", str(finished("prunus")), "--format", "hub", "--push", "small"]) == 2


def test_a_file_in_the_folders_place_is_refused(finished: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("")
    spec = SimpleNamespace()
    with pytest.raises(ConfigError, match="is a file"):
        hub.write_folder(finished("prunus"), tmp_path / "hub", spec, real=None, trust=False)  # type: ignore[arg-type]
