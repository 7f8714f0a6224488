"""List what is in the model registry, for people: versions, aliases, metrics, and the story of promotions.

dho registry
"""

from __future__ import annotations

import datetime
from typing import Any

from dho.config import Config
from dho.evaluation.metrics import COMBINED, METRICS, SOURCES
from dho.registry.promote import history
from dho.tracking.server import connect, one_line, tracking_uri

RESULTS = (
    *(f"{COMBINED}/{metric.name}" for metric in METRICS),
    *(f"{source.name}/{METRICS[0].name}" for source in SOURCES if source.name != COMBINED),
)
"""Columns of metrics: all of what a version answers, and the first one of what it is compared with."""
SPEED = "latency_ms/batch1/threads1/p99"


def listing(config: Config) -> tuple[list[str], list[list[str]], list[str]]:
    """Return column names, one row per version (newest first), and one line per change of an alias (oldest first).

    Raises:
        TrackingError: MLflow cannot be reached or refuses, or has no such registered model.
    """
    client, name = connect(config.tracking), config.registry.name
    with one_line(tracking_uri(config.tracking), f"cannot list {name}", "`dho register` makes it"):
        model = client.get_registered_model(name)
        versions: list[Any] = []
        token = None
        while token is None or token:
            page = client.search_model_versions(f"name = '{name}'", page_token=token)
            versions += page
            token = page.token or ""
        story = history(client, name)

    columns = [
        "version",
        "aliases",
        "method",
        "precision",
        *RESULTS,
        "p99 ms",
        "MB",
        "made",
        "run",
    ]

    rows = []
    for version in sorted(versions, key=lambda version: -int(version.version)):
        tags = version.tags
        aliases = sorted(alias for alias, number in model.aliases.items() if str(number) == str(version.version))
        size = f"{int(tags['artifact.bytes']) / 1e6:.1f}" if "artifact.bytes" in tags else ""
        status = "" if version.status == "READY" else f" ({version.status})"
        cells = [
            f"{version.version}{status}",
            ", ".join(aliases),
            tags.get("method", ""),
            tags.get("precision", ""),
            *(tags.get(f"test/{key}", "") for key in RESULTS),
        ]
        rows.append([*cells, tags.get(SPEED, ""), size, _date(version.creation_timestamp), (version.run_id or "")[:8]])
    return columns, rows, [_sentence(entry) for entry in story]


def _sentence(entry: dict[str, Any]) -> str:
    what = (
        f"{entry['at']} {entry['by']}: {entry['action']}, {entry['alias']} {entry['from'] or 'nobody'} -> {entry['to']}"
    )
    evidence = entry.get("evidence")
    if evidence:
        what += f", top-1 {evidence['top1']:.4f}"
        if "champion_top1" in evidence:
            what += f" against {evidence['champion_top1']:.4f} ({evidence['interval']})"
    return what + (f", because: {entry['reason']}" if "reason" in entry else "")


def _date(milliseconds: int) -> str:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M")
