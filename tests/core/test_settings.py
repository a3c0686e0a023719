"""Settings: validated, written so that they read back the same, and helpful when they are wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from prunus.core.errors import ConfigError
from prunus.core.importance import PluginConfig
from prunus.core.plugin_settings import configure, describe_config, parse_assignments, resolved
from prunus.core.settings import RunSettings, make_settings, override, read_settings
from prunus.core.toml_text import to_toml


class Config(PluginConfig):
    rounds: int = Field(default=3, ge=1, le=100)
    """How many rounds."""
    eta: float = Field(default=0.25, gt=0, lt=1)
    scope: Literal["global", "uniform"] = "global"
    steps: tuple[float, ...] = (0.5,)
    limit: int | None = None
    careful: bool = True
    label: str = "x"


def test_text_becomes_what_the_setting_is() -> None:
    given_values = {"rounds": "7", "eta": "0.5", "careful": "false", "steps": "[0.7, 0.35]", "label": "3"}
    config = configure(Config, "mine", given_values)
    assert config == Config(rounds=7, eta=0.5, careful=False, steps=(0.7, 0.35), label="3")


class Named(PluginConfig):
    teacher: str | None = "dense"
    refit: Literal["none", "all"] | None = "all"
    title: str = "x"


def test_an_absent_text_is_read_back_as_absent_and_a_choice_called_none_is_a_choice() -> None:
    chosen = configure(Named, "mine", {"teacher": "none", "refit": "none", "title": "none"})
    assert chosen == Named(teacher=None, refit="none", title="none")
    assert configure(Named, "mine", tomllib.loads(to_toml(resolved(chosen)))) == chosen


@pytest.mark.parametrize(("text", "value"), [("none", None), ("5", 5)])
def test_an_optional_setting_takes_none(text: str, value: int | None) -> None:
    assert configure(Config, "mine", {"limit": text}).limit == value  # type: ignore[attr-defined]


def test_a_list_may_be_written_with_commas() -> None:
    assert configure(Config, "mine", {"steps": "0.7,0.5"}).steps == (0.7, 0.5)  # type: ignore[attr-defined]


def test_an_unknown_setting_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"mine has no setting 'round'\. Did you mean 'rounds'") as caught:
        configure(Config, "mine", {"round": "3"})
    assert caught.value.key == "round"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rounds", "0", "greater than or equal to 1.*got '?0"),
        ("rounds", "many", "valid integer.*got 'many'"),
        ("eta", "nan", "less than 1, got nan"),
        ("scope", "locally", "'global' or 'uniform'.*got 'locally'"),
    ],
)
def test_a_wrong_value_names_setting_rule_and_value(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"mine: {key}.*{message}"):
        configure(Config, "mine", {key: value})


@pytest.mark.parametrize("text", ["rounds", "=3", ""])
def test_an_assignment_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_assignments([text])


def test_a_setting_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        parse_assignments(["a=1", "a=2"])


def test_a_resolved_config_names_every_setting_and_configures_the_same() -> None:
    class Limited(Config):
        limit: int | None = 8

    chosen = configure(Limited, "mine", {"limit": "none", "rounds": "7"})
    values = tomllib.loads(to_toml(resolved(chosen)))
    assert set(values) == set(Limited.model_fields)
    assert configure(Limited, "mine", values) == chosen


def test_a_whole_number_as_the_default_of_a_float_is_what_a_resumed_run_reads_back() -> None:
    class Whole(Config):
        share: float = 1

    chosen = configure(Whole, "mine", {})
    again = configure(Whole, "mine", tomllib.loads(to_toml(resolved(chosen))))
    assert repr(again) == repr(chosen)  # == alone takes 1 for 1.0, and a digest of directives does not


def test_a_config_describes_itself() -> None:
    rows = {row["key"]: row for row in describe_config(Config)}
    assert rows["rounds"]["bounds"] == ">= 1, <= 100"
    assert rows["rounds"]["meaning"] == "How many rounds."
    assert rows["scope"]["type"] == "global | uniform"
    assert rows["limit"]["type"] == "integer | none"
    assert rows["eta"]["default"] == 0.25


def test_an_unknown_run_setting_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'epoch'\. Did you mean 'epochs'"):
        make_settings({"epoch": 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": ["macs=0%"]}, "between 0% and 100%"),
        ({"targets": ["macs=150%"]}, "between 0% and 100%"),
        ({"targets": ["flops=50%"]}, "write one of macs=50%"),
        ({"targets": []}, "at least 1 item"),
        ({"epochs": -1}, "epochs: .*greater than or equal to 0"),
        ({"lr": 0}, "lr: .*greater than 0"),
        ({"batch_size": 1.5}, "batch_size: "),
        ({"sched": "sine"}, "'cosine', 'tanh', 'poly' or 'step'"),
        ({"seed": -1}, "seed: "),
        ({"holdout": 1.0}, "holdout: "),
    ],
)
def test_a_wrong_run_setting_is_one_line_with_key_and_rule(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_settings(values)
    assert "\n" not in str(caught.value)


def test_settings_written_to_a_file_read_back_the_same(tmp_path: Path) -> None:
    settings = make_settings(
        {
            "plugin": "one-shot",
            "targets": ["macs=50%", "size=8MB"],
            "model": 'odd "name"\n\t\x7f\\',
            "checkpoint": "weights/a.safetensors",
            "epochs": 1.5,
            "trust": True,
        }
    ).with_plugin_settings(["rounds=3", "importance.p=1"])
    path = tmp_path / "run.toml"
    path.write_text(settings.to_toml(), "utf-8")
    again = make_settings(read_settings(path))
    assert again == settings.model_copy(update={"trust": False})
    assert (again.config, again.importance_config) == ({"rounds": "3"}, {"p": "1"})


@pytest.mark.parametrize("text", ["plugin = ", "\xff"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not TOML"):
        read_settings(path)


def test_every_run_setting_has_a_meaning_in_the_schema() -> None:
    properties = RunSettings.model_json_schema()["properties"]
    assert all(properties[key].get("description") for key in RunSettings.model_fields)


_SCALARS = (
    st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)
_KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@given(
    st.dictionaries(
        _KEYS, _SCALARS | st.lists(_SCALARS, max_size=3) | st.dictionaries(_KEYS, _SCALARS, max_size=3)
    )
)
def test_plain_data_survives_toml(data: dict[str, Any]) -> None:
    expected = {key: value for key, value in data.items() if value != {}}
    assert tomllib.loads(to_toml(data)) == expected


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({}, []),
        ({"plugin": "one-shot", "lr": 0.2}, []),
        ({"plugin": "gsm-anneal"}, ["config", "importance", "importance_config"]),
        ({"plugin": "gsm-anneal", "importance": "taylor"}, ["config", "importance_config"]),
        ({"importance": "taylor"}, ["importance_config"]),
        ({"opt": "adamw"}, ["lr", "recovery_base_lr", "weight_decay"]),
        ({"opt": "adamw", "lr": 0.002}, ["recovery_base_lr", "weight_decay"]),
        ({"lr": 0.1}, ["recovery_base_lr"]),
        ({"model": "timm/resnet18", "targets": ["macs=30%"]}, []),
    ],
)
def test_what_a_file_says_for_one_choice_is_not_used_for_another(
    given: dict[str, object], left_out: list[str]
) -> None:
    base = {
        "plugin": "one-shot",
        "config": {"scope": "layer"},
        "importance": "magnitude",
        "importance_config": {"p": 1.0},
        "opt": "sgd",
        "lr": 0.2,
        "recovery_base_lr": 0.07,
        "weight_decay": 5e-4,
        "model": "timm/test_resnet",
    }
    values, said = override(base, given)
    assert said == left_out
    assert values == {**{key: value for key, value in base.items() if key not in left_out}, **given}
