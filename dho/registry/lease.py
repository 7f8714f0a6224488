"""One process at a time changes a registered model, on any MLflow server: a claim that is written, read back, and given up.

    with claim(client, name, "promote") as mine:
        mine.intend({"alias": "champion", "old": "3", "new": "4"})
        mine.still_valid()
        client.set_registered_model_alias(...)

MLflow's registry can only set and read; it has no compare-and-swap. So a claim is a tag of its own (`claim.<token>`) on the registered
model. Whoever has written one reads all tags back and goes in only when no other claim is there; of two that see each other the later
withdraws. Each wrote before it read, so at least one of any two sees the other: two are never in at once.

A claim runs out after `LEASE_S` seconds, so that a process that died does not block the registry; what it had set out to do is in its
claim, and the next one in finishes it or drops it (`recover`). The lease is where this is weaker than a lock: a process that is
stopped for longer than its lease between `still_valid` and its change may still make it. Clocks have to agree within `SKEW_S`.
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
SKEW_S = 5.0
PAUSE_S = 0.5
PREFIX = "claim."


class ClaimHeld(DhoError):
    """Another process is changing the registered model."""

    may_pass = True


@dataclass
class Claim:
    """A claim that is held."""

    client: MlflowClient
    name: str
    token: str
    by: str
    action: str
    until: float
    """Epoch seconds when it runs out."""
    intent: dict[str, Any] | None = None

    def write(self) -> None:
        """Set the claim's tag."""
        value = {"action": self.action, "by": self.by, "until": self.until, "intent": self.intent}
        self.client.set_registered_model_tag(self.name, PREFIX + self.token, json.dumps(value))

    def intend(self, intent: dict[str, Any]) -> None:
        """Write down what is about to be done, so that the next process in can finish it if this one dies."""
        self.intent = intent
        self.write()

    def still_valid(self) -> None:
        """Raise `ClaimHeld` when the claim has run out, or is about to."""
        if time.time() > self.until - SKEW_S:
            raise ClaimHeld(
                f"{self.name}: the claim to {self.action} ran out before it was done (the server is slow); run it again"
            )


@contextlib.contextmanager
def claim(
    client: MlflowClient, name: str, action: str, by: str, recover: Callable[[dict[str, Any]], None]
) -> Iterator[Claim]:
    """Hold the registered model, having waited for others. Afterwards the claim goes; where something begun has failed, it runs out.

    Args:
        action: word for messages.
        by: who.
        recover: finishes or drops the intent of a claim that ran out, in the order of their ends.

    Raises:
        ClaimHeld: another process held it all the time.
    """
    deadline = time.time() + LEASE_S + 2 * SKEW_S
    said = False
    while True:
        mine = Claim(client, name, f"{time.time_ns():020d}-{secrets.token_hex(8)}", by, action, 0.0)
        # The earliest stays until the others have withdrawn or finished, and renews its claim meanwhile; the others withdraw.
        while True:
            mine.until = time.time() + LEASE_S
            mine.write()
            others, dead = _others(client, name, mine)
            if not others or min(others) < mine.token or time.time() > deadline:
                break
            time.sleep(PAUSE_S)
        if not others:
            break
        client.delete_registered_model_tag(name, PREFIX + mine.token)
        first = others[min(others)]
        if time.time() > deadline:
            raise ClaimHeld(f"{name}: {first['by']} is at work there ({first['action']}); try again in a minute")
        if not said:
            print(
                f"{name}: waiting for {first['by']} ({first['action']}), at most {LEASE_S + SKEW_S:.0f} s",
                file=sys.stderr,
            )
            said = True
        time.sleep(PAUSE_S)
    for token in sorted(dead, key=lambda token: float(dead[token]["until"])):
        if dead[token]["intent"] is not None:
            recover(dead[token]["intent"])
        client.delete_registered_model_tag(name, PREFIX + token)
    try:
        yield mine
    except BaseException:
        if mine.intent is None:  # nothing was begun, so there is nothing to finish
            with contextlib.suppress(Exception):
                client.delete_registered_model_tag(name, PREFIX + mine.token)
        raise
    client.delete_registered_model_tag(name, PREFIX + mine.token)


def _others(
    client: MlflowClient, name: str, mine: Claim
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Claims of others by token: those that hold, and those that ran out."""
    tags = client.get_registered_model(name).tags
    claims = {key.removeprefix(PREFIX): json.loads(value) for key, value in tags.items() if key.startswith(PREFIX)}
    claims.pop(mine.token, None)
    living = {token: value for token, value in claims.items() if time.time() < value["until"] + SKEW_S}
    return living, {token: value for token, value in claims.items() if token not in living}
