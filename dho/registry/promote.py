"""Decide which version runs in production: promote a candidate to champion by rules, and roll back.

    from dho.config import load
    config = load("params.yaml")
    decision = promote(config, Workspace())
    rollback(config, "answers too slowly")

Aliases and tags only; MLflow's stages are not used. Every change is an entry `audit.<number>` (JSON) among the
registered model's tags, and the versions say in tags of their own when, from which run, by whom and on what evidence.
Only one process at a time changes aliases (`dho/registry/lease.py`).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from rich.console import Console
from rich.table import Table

from dho.config import Config
from dho.core.errors import DhoError
from dho.core.workspace import Workspace
from dho.data.index import Index
from dho.evaluation.metrics import METRICS
from dho.registry import CANDIDATE, CHAMPION
from dho.registry.evidence import Evidence, TestSet, folder_bytes, folder_digest, measure_test, open_package
from dho.registry.lease import Lease, lease
from dho.registry.rules import Check, Performance, against, floors
from dho.tracking.server import connect, one_line, tracking_uri, who

AUDIT = "audit."


class PromotionRefused(DhoError):
    """A change of an alias that another process, or the state of the registry, stands against; nothing was changed."""


@dataclass
class Decision:
    """What `promote` measured and did.

    Attributes:
        name: the registered model.
        version: the candidate's number.
        target: the alias to move.
        champion: number of the version that had it before; None where there was none.
        checks: the rules' outcomes.
        promoted: whether the candidate has the alias now.
    """

    name: str
    version: str
    target: str
    champion: str | None
    checks: list[Check] = field(default_factory=list)
    promoted: bool = False

    @property
    def reasons(self) -> list[str]:
        """The rules that refuse."""
        return [
            f"{check.rule}: {check.value} (allowed: {check.limit})" for check in self.checks if check.passed is False
        ]


def promote(config: Config, workspace: Workspace, candidate: str = CANDIDATE, target: str = CHAMPION) -> Decision:
    """Check a version by `registry.rules` and, if it keeps all of them, move the alias to it.

    Args:
        config: `tracking`, `registry` and `evaluate.ece_bins` are used.
        workspace: `prepared` is read; both versions are compared on its test images.
        candidate: alias or number of the version to promote.
        target: alias to move.

    Returns:
        The decision; `promoted` is False where a rule refuses, and then nothing was changed. A version that has the
        alias already is not checked again: `promoted` is True and there are no checks.

    Raises:
        PromotionRefused: the champion or the candidate changed while they were compared.
        DataError: the workspace holds no prepared data set.
        TrackingError: MLflow cannot be reached or refuses, or there is no such version.
    """
    client, name, uri = connect(config.tracking), config.registry.name, tracking_uri(config.tracking)
    with one_line(uri, f"has no {candidate} of {name}", "`dho register` makes one, `dho registry` lists them"):
        version = version_of(client, name, candidate)
    if version is None:
        raise DhoError(
            f"{name}: no version has the alias {candidate}; `dho register` makes one, `dho registry` lists them"
        )

    with one_line(uri, f"cannot compare the versions of {name}"):
        champion = version_of(client, name, target)
        decision = Decision(name, str(version.version), target, number_of(champion))
        if decision.version != decision.champion:
            test = TestSet.of(Index.load(workspace.prepared))
            decision.checks, evidence = _compare(config, client, test, version, champion)
            if decision.reasons:
                return decision

    recovering = functools.partial(recover, client, name)
    doing = f"promote version {version.version}"
    with one_line(uri, f"cannot {doing} of {name}"), lease(client, name, doing, who(), recovering) as held:
        still, now = (number_of(version_of(client, name, alias)) for alias in (candidate, target))
        if still != decision.version:
            raise PromotionRefused(f"{name}: {candidate} moved to version {still} meanwhile; nothing was changed")
        # The alias may be there already: before, meanwhile, or by the recovery of an attempt that was interrupted.
        if now != decision.version:
            if now != decision.champion:
                raise PromotionRefused(
                    f"{name}: version {now or 'none'} became {target} while version {version.version} was compared "
                    f"with {decision.champion or 'none'}{_by(client, name)}; nothing was changed, run it again to "
                    "compare with the new one"
                )
            entry = _entry("promote", target, decision.champion, decision.version, version.run_id)
            _move(held, entry | {"evidence": evidence}, decision.champion)
    decision.promoted = True
    return decision


def print_decision(decision: Decision) -> None:
    """Print the table of rules of a promotion, and its outcome."""
    if decision.checks:
        table = Table("rule", "value", "limit", "verdict")
        for check in decision.checks:
            table.add_row(check.rule, check.value, check.limit, check.verdict)
        Console().print(table)
    if decision.promoted:
        print(f"promote: models:/{decision.name}@{decision.target} is version {decision.version}")
    else:
        print(
            f"promote: version {decision.version} of {decision.name} is refused, nothing was changed: "
            + "; ".join(decision.reasons)
        )


def rollback(config: Config, reason: str, target: str = CHAMPION) -> tuple[str, str]:
    """Return the alias to the version that had it before.

    Args:
        reason: why; kept in the tags.
        target: alias to move.

    Returns:
        The numbers of both versions: the one that had the alias, and the one that has it now.

    Raises:
        PromotionRefused: there is no earlier version, or its files are not those that were registered.
        TrackingError: MLflow cannot be reached or refuses.
    """
    client, name, uri = connect(config.tracking), config.registry.name, tracking_uri(config.tracking)
    with (
        one_line(uri, f"cannot roll {name} back"),
        lease(client, name, "rollback", who(), functools.partial(recover, client, name)) as held,
    ):
        story = history(client, name)
        past = _champions(story, target)
        now = number_of(version_of(client, name, target))
        if now is None or len(past) < 2:
            raise PromotionRefused(f"{name}: {target} has no earlier version to go back to; nothing was changed")
        if past[-1] != now:
            raise PromotionRefused(
                f"{name}: {target} is version {now}, but the last promotion set {past[-1]}: the alias was moved by "
                "hand; set it by hand again (nothing was changed)"
            )

        back = client.get_model_version(name, past[-2])
        with tempfile.TemporaryDirectory() as folder:
            check = _intact(client, back, Path(folder))[0]
        if not check.passed:
            raise PromotionRefused(f"{name} version {back.version}: {check.rule}: {check.value}; nothing was changed")

        entry = _entry("rollback", target, now, past[-2], back.run_id) | {"reason": reason}
        _move(held, entry, past[-3] if len(past) > 2 else None)
        return now, past[-2]


def history(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    """Return every change of an alias, oldest first."""
    tags = client.get_registered_model(name).tags
    return [json.loads(tags[key]) for key in sorted(tags) if key.startswith(AUDIT)]


def version_of(client: MlflowClient, name: str, alias: str) -> Any:
    """Return the version of an alias (None where no version has it) or of a number."""
    if alias.isdigit():
        return client.get_model_version(name, alias)
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else client.get_model_version(name, str(number))


def number_of(version: Any) -> str | None:
    """Return the number of a version as text, which is what a server returns; a database returns an int."""
    return None if version is None else str(version.version)


def previous_alias(target: str) -> str:
    """Return the alias of the version that had `target` before."""
    return "previous" if target == CHAMPION else f"previous-{target}"


def recover(client: MlflowClient, name: str, intent: dict[str, Any]) -> None:
    """Finish a change whose process died after the alias had moved; before that it had changed nothing."""
    entry = intent["entry"]
    if number_of(version_of(client, name, entry["alias"])) == entry["to"]:
        _record(client, name, intent)


def _compare(
    config: Config, client: MlflowClient, test: TestSet, candidate: Any, champion: Any
) -> tuple[list[Check], dict[str, Any]]:
    """The table of rules, and what of it goes into the tags."""
    rules, bins = config.registry.rules, config.evaluate.ece_bins
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checks = _intact(client, candidate, folder / "candidate")
        measured_on = candidate.tags.get("fingerprint.test")
        value = (measured_on or "not measured yet, so measured now")[:34]
        same = measured_on in (None, test.fingerprint)
        checks.append(Check("test_set", "measured on this test set", value, f"= {test.fingerprint[:16]}", same))
        if any(check.passed is False for check in checks):
            return checks, {}

        performance = _performance(folder / "candidate", test, bins)
        checks += floors(rules, performance)
        top1 = performance.evidence.metrics["top1"]
        evidence: dict[str, Any] = {"test": test.fingerprint, "images": len(test.rows), "top1": top1}
        if champion is None:
            checks.append(Check("champion", "gain over the champion", "there is no champion yet", "-", None))
            return checks, evidence

        intact = _intact(client, champion, folder / "champion")
        if any(check.passed is False for check in intact):
            renamed = (dataclasses.replace(check, rule=f"champion's {check.rule}") for check in intact)
            return checks + [check for check in renamed if check.passed is False], {}
        champions = _performance(folder / "champion", test, bins)

    compared = against(rules, performance.evidence, champions.evidence)
    evidence |= {"champion_top1": champions.evidence.metrics["top1"]}
    evidence |= {check.name: check.value for check in compared}
    return checks + compared, evidence


def _intact(client: MlflowClient, version: Any, folder: Path) -> list[Check]:
    """Fetch a version's package to `folder`; that it is READY and holds the files it was registered with."""
    checks = [Check("status", "status", version.status, "READY", version.status == "READY")]
    if version.status != "READY":
        return checks
    limit = version.tags.get("artifact.sha256", "no hash was registered")
    try:
        mlflow.artifacts.download_artifacts(
            f"models:/{version.name}/{version.version}", dst_path=str(folder), tracking_uri=client.tracking_uri
        )
        files = folder_digest(folder)
    except (MlflowException, OSError) as error:
        files = f"cannot be read ({' '.join(str(error).split())[:80]})"
    value = files[:16] if files == limit else f"{files[:16]}: changed"
    return [*checks, Check("files", "files as registered (SHA-256)", value, limit[:16], files == limit)]


def _performance(folder: Path, test: TestSet, ece_bins: int) -> Performance:
    """What was measured at registration; measured now where that was another test set, other bins or fewer metrics."""
    size = folder_bytes(folder)
    evidence_folder = folder / "artifacts" / "evidence"
    measured = json.loads((evidence_folder / "measured.json").read_text())
    known = measured.get("test", {})
    same = known.get("fingerprint") == test.fingerprint and measured["ece_bins"] == ece_bins
    if same and all(metric.name in known["metrics"] for metric in METRICS):
        path = evidence_folder / "test.parquet"
        evidence = Evidence.load(path, test.fingerprint, measured["class_names"], known["metrics"])
    else:
        with open_package(folder) as package:
            evidence = measure_test(package, test, ece_bins)
    return Performance(evidence, measured["latency_ms"]["batch1/threads1/p99"], size)


def _by(client: MlflowClient, name: str) -> str:
    story = history(client, name)
    return f" (by {story[-1]['by']} at {story[-1]['at']})" if story else ""


def _entry(action: str, target: str, old: str | None, new: str, run_id: str | None) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return {"action": action, "alias": target, "from": old, "to": new, "at": now, "by": who(), "run_id": run_id}


def _move(held: Lease, entry: dict[str, Any], previous: str | None) -> None:
    """Move the alias, in one request; what is about to be done is written down before."""
    client, name = held.client, held.name
    numbers = [int(key.removeprefix(AUDIT)) for key in client.get_registered_model(name).tags if key.startswith(AUDIT)]
    intent = {"entry": entry, "previous": previous, "number": max(numbers, default=0) + 1}
    held.intend(intent)
    held.check_valid()
    client.set_registered_model_alias(name, entry["alias"], entry["to"])
    _record(client, name, intent)


def _record(client: MlflowClient, name: str, intent: dict[str, Any]) -> None:
    """Record a move: alias `previous`, the tags of both versions, the entry in the story. May be done twice."""
    entry, previous = intent["entry"], intent["previous"]
    alias = previous_alias(entry["alias"])
    if previous is not None:
        client.set_registered_model_alias(name, alias, previous)
    elif alias in client.get_registered_model(name).aliases:
        client.delete_registered_model_alias(name, alias)
    word = "promoted" if entry["action"] == "promote" else "restored"
    tags = {f"{word}.{key}": entry[key] for key in ("at", "by", "run_id", "from")}
    if "evidence" in entry:
        tags[f"{word}.evidence"] = json.dumps(entry["evidence"])
    for key, value in tags.items():
        client.set_model_version_tag(name, entry["to"], key, value if value is not None else "none")
    if entry["action"] == "rollback":
        for key in ("at", "by", "reason"):
            client.set_model_version_tag(name, entry["from"], f"rolled_back.{key}", entry[key])
    client.set_registered_model_tag(name, f"{AUDIT}{intent['number']:06d}", json.dumps(entry))


def _champions(story: list[dict[str, Any]], target: str) -> list[str]:
    """The versions that had the alias and were not rolled back, oldest first."""
    stack: list[str] = []
    for entry in story:
        if entry["alias"] == target:
            if entry["action"] == "rollback":
                stack.pop()
            else:
                if entry["from"] is not None and stack[-1:] != [entry["from"]]:  # an alias that was set by hand
                    stack.append(entry["from"])
                stack.append(entry["to"])
    return stack
