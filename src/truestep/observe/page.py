"""Write a run's report: one HTML file that needs nothing else and runs no script."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from truestep.observe import svg
from truestep.observe.charts import make_charts
from truestep.observe.log import Metrics, read_records
from truestep.observe.markup import block, facts_list, line, write_page
from truestep.observe.plots import read_run, summarize
from truestep.observe.spikes import Spike, find_spikes, inspect_command
from truestep.observe.text import format_duration
from truestep.setting_sources import read_settings_file
from truestep.storage import read_file

_MANIFEST_LIMIT_BYTES = 2**20  # facts about a run, not data
_MAX_SAMPLES = 12
_MAX_SPIKES = 20

_STYLE = (
    """
.charts { display: grid; grid-template-columns: 1fr; gap: 28px; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 6px; }
figcaption h3 { margin: 0; }
.wide { display: none; }
@media (min-width: 760px) {
  .charts { grid-template-columns: 1fr 1fr 1fr; }
  .charts figure:first-child { grid-column: 1 / -1; }
  .wide { display: block; }
  .wide + .narrow { display: none; }
}
mark { background: var(--mark); color: inherit; border-radius: 3px; font-weight: 600; }
.samples, .tables { display: grid; gap: 22px; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 760px) { .tables { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.tables th { width: 45%; }
"""
    + svg.STYLE
)


def write_report(run: Path) -> Path:
    """Write `report.html` from what a run's directory holds; it appears whole or not at all.

    Missing pieces (samples, validations, config, manifest) are left out.
    Errors: ValueError for a directory without steps, or for a file in it that cannot be read.
    """
    metrics = read_run(run)
    if not len(metrics.training["step"]):
        raise ValueError(f"{run} holds no steps yet; write the report once it has trained")
    manifest, facts = _read_manifest(run)
    name = line(run.resolve().name)
    spikes = find_spikes(metrics.training["step"], metrics.training["loss"])
    sections = [
        f'<h1>{name}</h1><p class="subtitle">{_subtitle(manifest)}</p>',
        _headline(metrics, manifest, len(spikes)),
        _curves(metrics),
        _spikes(spikes, run),
        _samples(run / "samples.jsonl"),
        _tables("Configuration", _config_tables(run)),
        _tables("Facts", [("", facts)] if facts else []),
    ]
    return write_page(run / "report.html", name, _STYLE, sections)


def _subtitle(manifest: Mapping[str, Any]) -> str:
    keys = ("started", "device", "precision")
    parts = [_value(manifest[key]) for key in keys if manifest.get(key)]
    return " · ".join([*parts, "a report by truestep"])


def _headline(metrics: Metrics, manifest: Mapping[str, Any], num_spikes: int) -> str:
    training = metrics.training
    tokens, seconds = int(training["num_tokens"].sum()), float(np.nansum(training["step_seconds"]))
    facts = [
        *summarize(metrics),
        ("steps", f"{training['step'][-1]:,}"),
        ("tokens", f"{tokens:,}"),
        ("training time", format_duration(seconds)),
    ]
    if seconds > 0:
        facts.append(("tokens per second", f"{tokens / seconds:,.0f}"))
    if skipped := int(training["skipped"].sum()):
        facts.append(("skipped updates", f"{skipped:,}"))
    if num_spikes:
        facts.append(("loss spikes", f"{num_spikes:,}"))
    if isinstance(parameters := manifest.get("num_parameters"), int):
        facts.append(("parameters", f"{parameters:,}"))
    return facts_list(facts)


def _curves(metrics: Metrics) -> str:
    figures = []
    for chart in make_charts(metrics):
        drawn = f'<div class="narrow">{svg.draw_svg(chart, 330, 210)}</div>'
        if chart.name == "loss":
            drawn = f'<div class="wide">{svg.draw_svg(chart, 1000, 370)}</div>{drawn}'
        key = svg.draw_key(chart)
        figures.append(
            f"<figure><figcaption><h3>{chart.title}</h3>{key}</figcaption>{drawn}</figure>"
        )
    return f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>'


def _spikes(spikes: list[Spike], run: Path) -> str:
    """Return a table of the spikes, or of the highest of them, in the order of their steps."""
    if not spikes:
        return ""
    highest = sorted(spikes, key=lambda spike: spike.expected - spike.loss)[:_MAX_SPIKES]
    note = f", the {_MAX_SPIKES} highest of {len(spikes):,}" if len(spikes) > _MAX_SPIKES else ""
    rows = "".join(
        f"<tr><td>{spike.step:,}</td><td>{spike.loss:.3f}</td><td>{spike.expected:.3f}</td>"
        f"<td>{spike.deviations:.1f}</td><td><code>{line(inspect_command(spike, run))}</code></td>"
        "</tr>"
        for spike in sorted(highest)
    )
    return (
        f'<h2>Loss spikes <span class="note">and how to see their text{note}</span></h2>'
        "<table><tr><th>step</th><th>loss</th><th>median before it</th><th>deviations above</th>"
        f"<th>command</th></tr>{rows}</table>"
    )


def _samples(path: Path) -> str:
    records = [record for _, record in read_records(path)]
    if not records:
        return ""
    count = min(len(records), _MAX_SAMPLES)
    chosen = [records[i] for i in np.linspace(len(records) - 1, 0, count).round().astype(int)]
    note = f", {count} of {len(records)}" if count < len(records) else ""
    blocks = (
        f"<section><h3>step {record['step']:,}</h3><pre>"
        f"<mark>{_sample(record.get('prompt'))}</mark>{_sample(record.get('text'))}</pre></section>"
        for record in chosen
    )
    return (
        f'<h2>Samples <span class="note">newest first{note}</span></h2>'
        f'<div class="samples">{"".join(blocks)}</div>'
    )


def _sample(text: Any) -> str:
    return block(text) if isinstance(text, str) else ""


def _config_tables(run: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    path = run / "config.toml"
    if not path.exists():
        return []
    config = read_settings_file(path)
    flat = {key: value for key, value in config.items() if not isinstance(value, dict)}
    sections = {"": flat} if flat else {}
    sections |= {key: value for key, value in config.items() if isinstance(value, dict)}
    return [(name, _rows(values)) for name, values in sections.items()]


def _tables(title: str, tables: list[tuple[str, list[tuple[str, str]]]]) -> str:
    blocks = []
    for name, rows in tables:
        caption = f"<caption>{line(name)}</caption>" if name else ""
        body = "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in rows)
        blocks.append(f"<table>{caption}{body}</table>")
    return f'<h2>{title}</h2><div class="tables">{"".join(blocks)}</div>' if blocks else ""


def _read_manifest(run: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the run's manifest, and its facts as rows of a table."""
    path = run / "manifest.json"
    if not path.exists():
        return {}, []
    try:
        manifest = json.loads(read_file(path, limit=_MANIFEST_LIMIT_BYTES))
        if not isinstance(manifest, dict):
            raise ValueError("it is not an object")
        return manifest, _rows(manifest)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; restore or remove it") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a manifest: {error}; restore or remove it") from None


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(line(key), _value(value)) for key, value in _flatten(values)]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value with its dotted name."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(value: Any) -> str:
    """Return a value from a file as one line of HTML."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    return line(value if isinstance(value, str) else json.dumps(value, default=str))
