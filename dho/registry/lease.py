"""Let one process at a time change a registered model, on any MLflow server.

    with lease(MlflowClient(), "dho-student", "promote version 4", "ann", recover=print) as held:
        held.intend({"alias": "champion", "from": "3", "to": "4"})
        held.check_valid()
        held.client.set_registered_model_alias(held.name, "champion", "4")

MLflow's registry can only set and read; it has no compare-and-swap. So a lease is a tag of its own (`lease.<token>`) on
the registered model. Whoever has written one reads all tags back and enters only when there is no other lease; of two
that see each other the later withdraws. Each wrote before it read, so at least one of any two sees the other: two are
never in at once.

A lease runs out after `LEASE_S` seconds, so that a process that died does not block the registry; what it had set out
to do is in its lease, and the next process in finishes it or drops it (`recover`). That it runs out is where this is
weaker than a lock: a process that is stopped for longer than its lease between `check_valid` and its change may still
make it. Clocks have to agree within `SKEW_S`.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient

from dho.core.errors import DhoError

LEASE_S = 30.0
"""How long a lease lasts, seconds."""
SKEW_S = 5.0
"""By how much clocks may differ, seconds."""
PAUSE_S = 0.5
"""Between two looks at the tags, seconds."""
PREFIX = "lease."
"""Of the tags."""


class LeaseHeld(DhoError):
    """Another process is changing the registered model."""

    may_pass = True


@dataclass
class Lease:
    """A lease that is held."""

    client: MlflowClient
    name: str
    token: str
    by: str
    action: str
    until: float
    """Epoch seconds when it runs out."""
    intent: dict[str, Any] | None = None

    def write(self) -> None:
        """Write the lease's tag."""
        value = {"action": self.action, "by": self.by, "until": self.until, "intent": self.intent}
        self.client.set_registered_model_tag(self.name, PREFIX + self.token, json.dumps(value))

    def intend(self, intent: dict[str, Any]) -> None:
        """Write down what is about to be done, so that the next process in can finish it if this one dies."""
        self.intent = intent
        self.write()

    def check_valid(self) -> None:
        """Raise `LeaseHeld` when the lease has run out, or is about to."""
        if time.time() > self.until - SKEW_S:
            raise LeaseHeld(
                f"{self.name}: the lease to {self.action} ran out before it was done (the server is slow); run it again"
            )


@contextlib.contextmanager
def lease(
    client: MlflowClient, name: str, action: str, by: str, recover: Callable[[dict[str, Any]], None]
) -> Iterator[Lease]:
    """Wait for others, then hold the registered model.

    Afterwards the lease is removed; where something that was begun has failed, it is left to run out.

    Args:
        action: word for messages.
        by: who.
        recover: finishes or drops the intent of a lease that ran out; called in the order in which they ran out.

    Raises:
        LeaseHeld: another process held it all the time.
    """
    deadline = time.time() + LEASE_S + 2 * SKEW_S
    reported = False
    while True:
        own = Lease(client, name, f"{time.time_ns():020d}-{secrets.token_hex(8)}", by, action, 0.0)
        # The earliest stays until the others have withdrawn or finished, and renews its lease meanwhile; the others
        # withdraw.
        while True:
            own.until = time.time() + LEASE_S
            own.write()
            others, expired = _others(client, name, own)
            if not others or min(others) < own.token or time.time() > deadline:
                break
            time.sleep(PAUSE_S)
        if not others:
            break
        client.delete_registered_model_tag(name, PREFIX + own.token)
        first = others[min(others)]
        if time.time() > deadline:
            raise LeaseHeld(f"{name}: {first['by']} is at work there ({first['action']}); try again in a minute")
        if not reported:
            print(
                f"{name}: waiting for {first['by']} ({first['action']}), at most {LEASE_S + SKEW_S:.0f} s",
                file=sys.stderr,
            )
            reported = True
        time.sleep(PAUSE_S)

    for token in sorted(expired, key=lambda token: float(expired[token]["until"])):
        if expired[token]["intent"] is not None:
            recover(expired[token]["intent"])
        client.delete_registered_model_tag(name, PREFIX + token)

    try:
        yield own
    except BaseException:
        if own.intent is None:  # nothing was begun, so there is nothing to finish
            with contextlib.suppress(Exception):
                client.delete_registered_model_tag(name, PREFIX + own.token)
        raise
    client.delete_registered_model_tag(name, PREFIX + own.token)


def _others(client: MlflowClient, name: str, own: Lease) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Leases of others by token: those that hold, and those that ran out."""
    tags = client.get_registered_model(name).tags
    leases = {key.removeprefix(PREFIX): json.loads(value) for key, value in tags.items() if key.startswith(PREFIX)}
    leases.pop(own.token, None)
    valid = {token: value for token, value in leases.items() if time.time() < value["until"] + SKEW_S}
    return valid, {token: value for token, value in leases.items() if token not in valid}
