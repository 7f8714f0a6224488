"""The MLflow server: its address, a client, and its errors as one line.

    client = connect(config.tracking)
    with one_line(tracking_uri(config.tracking), "cannot list the models"):
        client.search_registered_models()

A request is not repeated for minutes, as MLflow's own are.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dho.config import TrackingConfig
from dho.core.errors import DhoError, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

REQUEST_S = 10
"""Longest wait for one answer, seconds."""


def tracking_uri(config: TrackingConfig) -> str:
    """Return MLflow's address: environment variable MLFLOW_TRACKING_URI, else `tracking.uri`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or config.uri


def connect(config: TrackingConfig) -> MlflowClient:
    """Return a client of the tracking server.

    The server also becomes this process's tracking and registry address for `mlflow.*`.

    Raises:
        TrackingError: no answer within `REQUEST_S` seconds, or the server refuses the credentials.
    """
    import mlflow
    import sqlalchemy
    from mlflow.store.db.db_types import DATABASE_ENGINES

    # Its reports of its own housekeeping (creating tables, resolving pip) would bury ours.
    for name in ("mlflow.store.db.utils", "mlflow.pyfunc", "mlflow.utils.environment", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = tracking_uri(config)
    with one_line(uri, "does not answer", "start it, or set MLFLOW_TRACKING_URI or tracking.uri to one that runs"):
        # This request comes first because MLflow itself would retry for minutes.
        if uri.startswith("http"):
            post(uri, "experiments/search", {"max_results": 1})
        elif uri.split(":")[0].split("+")[0] in DATABASE_ENGINES:
            engine = sqlalchemy.create_engine(uri)
            engine.connect().close()
            engine.dispose()

        unset = [name for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI") if name not in os.environ]
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        for name in unset:
            # mlflow has set it, and it would take precedence over another config in this process and in its children.
            os.environ.pop(name, None)
        client = mlflow.MlflowClient()
        client.search_experiments(max_results=1)
    return client


def post(uri: str, endpoint: str, body: dict[str, Any]) -> None:
    """Send one request to MLflow's REST API, once and for at most `REQUEST_S` seconds.

    MLflow's client retries for minutes and takes its limits from environment variables, so they cannot be shortened for
    the background thread alone.

    Args:
        uri: of the server, http or https.
        endpoint: below `/api/2.0/mlflow/`.
        body: becomes JSON.

    Raises:
        Exception: of MLflow or requests, where the server does not answer or refuses.
    """
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request, verify_rest_response

    path = f"/api/2.0/mlflow/{endpoint}"
    limits = {"max_retries": 0, "timeout": REQUEST_S, "raise_on_status": False}
    response = http_request(get_default_host_creds(uri), path, "POST", json=body, **limits)  # type: ignore[no-untyped-call]
    verify_rest_response(response, path)


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of an experiment, which is made if need be.

    For SQLite its artifacts are in `mlartifacts` beside the database.

    Raises:
        TrackingError: the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.engine import make_url

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = make_url(uri).database if uri.startswith("sqlite") else None
        location = (Path(database).resolve().parent / "mlartifacts").as_uri() if database else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another process may have been faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        restore = f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        raise TrackingError(
            f"MLflow at {shown(uri)}: experiment {name!r} was deleted; {restore}, or choose another tracking.experiment"
        )
    return str(experiment.experiment_id)


@contextlib.contextmanager
def one_line(uri: str, failure: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever MLflow, its database or its artifact store raise into one line.

    Args:
        uri: the address to name.
        failure: what did not work, after "MLflow at <address>".
        remedy: what to do.

    Raises:
        TrackingError: in place of the error; a `DhoError` stays what it is.
    """
    try:
        yield
    except DhoError:
        raise
    except Exception as error:
        code = getattr(error, "error_code", "")
        if code == "PERMISSION_DENIED":
            failure, remedy = f"does not allow {who()} to do this: it {failure}", "ask for the permission EDIT"
        if code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            failure = "refuses the credentials"
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        raise TrackingError(
            f"MLflow at {shown(uri)} {failure} ({reason(error)})" + (f"; {remedy}" if remedy else "")
        ) from error


def who() -> str:
    """Return who is at work, for the registry's tags: MLflow's user, else the machine's."""
    return os.environ.get("MLFLOW_TRACKING_USERNAME") or f"{getpass.getuser()}@{socket.gethostname()}"


def reason(error: BaseException) -> str:
    """Return the innermost cause of an error on one line."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return shown(" ".join(str(error).split())[:300] or type(error).__name__)


def shown(text: str) -> str:
    """Return text without the user and password of an address in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)
