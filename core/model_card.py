"""README.md of a model folder: what a stranger must know before using the model, made from the run's report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from prunus.core.display import human, proof
from prunus.core.finished import repeat
from prunus.core.report import Report
from prunus.core.toml_text import to_toml


def model_card(report: Report, usage: str, limits: Sequence[str]) -> str:
    """The card as Markdown with the front matter that model hubs read.

    `usage` is Python code that loads the model, `limits` are sentences of the adapter's own.
    """
    parts = [
        _front_matter(report),
        f"# {_line(report.model)}, {report.pruned.macs / max(report.dense.macs, 1):.0%} of the MACs\n",
        f"A structurally pruned {_code(report.model)}: {_removed(report)} by the method "
        f"{_code(report.plugin)}. It is a plain, dense, smaller model and needs no sparse kernels.\n",
        "## Results\n",
        _results(report),
        _targets(report),
        proof(report) + "\n",
        "## Use\n",
        f"```python\n{usage.strip()}\n```\n",
        f"Input: {' x '.join(map(str, report.input_size))} (channels, height, width), normalised as "
        "`config.json` says under `input`.\n",
        "## How it was made\n",
        _repeated(report),
        f"```toml\n{to_toml(_plain(report.settings)).strip()}\n```\n",
        f"Versions: {', '.join(f'{_line(name)} {_line(v)}' for name, v in report.versions.items())}.\n",
        "## Limits\n",
        "\n".join(f"- {_line(limit)}" for limit in (*_limits(report), *limits, *report.notes)) + "\n",
    ]
    return "\n".join(part for part in parts if part)


def _repeated(report: Report) -> str:
    if repeat(report) is None:
        return "By `prunus.adapters.pytorch.prune`, with an object as the model and these settings:\n"
    return "Save these settings as `run.toml` and run `optimize prune --config run.toml`:\n"


def _front_matter(report: Report) -> str:
    """JSON is YAML: quoted, whatever the names hold."""
    facts: dict[str, Any] = {
        "library_name": "prunus",
        "tags": ["pruning", "structured-pruning", "image-classification"],
    }
    if report.classes is not None:
        facts["pipeline_tag"] = "image-classification"
    if report.settings.get("pretrained") and report.model.startswith("timm/"):
        facts["base_model"] = report.model
    if report.pruned.accuracy is not None:
        facts["metrics"] = ["accuracy"]
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in facts.items()) + "---\n"


def _removed(report: Report) -> str:
    blocks = report.depth.removed
    channels = any(width.kept < width.units for width in report.widths)
    parts = ["whole channels were removed"] if channels or not blocks else []
    if blocks:
        parts.append(f"{len(blocks)} of {report.depth.blocks} residual blocks were taken out")
    if report.depth.reduced:
        parts.append(f"{len(report.depth.reduced)} of {report.depth.kernels} kernels became 1 x 1")
    return " and ".join(parts)


def _results(report: Report) -> str:
    dense, pruned = report.dense, report.pruned
    rows: list[tuple[str, ...]] = [("", "original", "this model", "share")]
    for title, key, unit in (("MACs", "macs", ""), ("parameters", "params", ""), ("size", "bytes", "B")):
        before, after = getattr(dense, key), getattr(pruned, key)
        rows.append((title, human(before, unit), human(after, unit), f"{after / max(before, 1):.1%}"))
    if pruned.accuracy is not None:
        before = "-" if dense.accuracy is None else f"{dense.accuracy:.2%}"
        rows.append((f"top-1 on the test split of {_code(report.data)}", before, f"{pruned.accuracy:.2%}", ""))
    if report.latency is not None:
        times = report.latency.dense, report.latency.pruned
        milliseconds = [f"{1e3 * seconds:.3g} ms" for seconds in times]
        share = f"{times[1] / max(times[0], 1e-12):.1%}"
        rows.append((f"latency of one image, {report.latency.threads} thread(s)", *milliseconds, share))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---:|---:|---:|", *lines[1:]]) + "\n"


def _targets(report: Report) -> str:
    verdict = "met" if report.target_met else "**missed**"
    return f"Target {', '.join(map(_line, report.targets))}: {verdict}.\n"


def _limits(report: Report) -> list[str]:
    classes = "" if report.classes is None else f" with {report.classes} classes"
    if report.data == "none":
        return ["It was pruned without any data; its accuracy is not known. Train it before use."]
    return [
        f"Trained and judged on {_code(report.data)}{classes}, {_counts(report)}; nothing is known of other data.",
        "One run with one seed: differences of a few images are chance.",
    ]


def _counts(report: Report) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in report.images.items() if count)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value not in ({}, [], None)}


def _line(text: str) -> str:
    """Text from a file inside Markdown: on one line, without HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def _code(text: str) -> str:
    """The same as a piece of code."""
    return "`" + _line(text).replace("`", "'") + "`"
