"""The registry on a real MLflow server: PostgreSQL, S3 artifacts, permissions, and the server killed half-way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from backends import MlflowServer, postgres, postgres_bin, s3
from conftest import Tiny, draw_image
from mlflow import MlflowClient
from mlflow.server.auth.client import AuthServiceClient

from dho.config import Config, StudentConfig, from_dict, to_dict
from dho.core.errors import TrackingError
from dho.core.workspace import Workspace
from dho.registry import lease as leases
from dho.registry.promote import history, promote, rollback
from dho.registry.register import register
from dho.student.model import Student
from dho.student.saved import StudentInfo, save_student
from dho.tracking.server import connect

pytestmark = [
    pytest.mark.skipif(postgres_bin() is None, reason="no PostgreSQL on this machine (Debian: apt install postgresql)"),
    pytest.mark.timeout(600),
]
STUDENT = StudentConfig(model="resnet18", model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}, input_size=32)
PASSWORD = "a long password for tests"


@dataclasses.dataclass
class House:
    """A server with three users: admin, releaser (registers and promotes) and reader (may read only)."""

    server: MlflowServer
    folder: Path
    config: Config
    tiny: Tiny
    patch: pytest.MonkeyPatch

    def log_in(self, user: str, password: str = PASSWORD) -> MlflowClient:
        self.patch.setenv("MLFLOW_TRACKING_USERNAME", user)
        self.patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        return connect(self.config.tracking)

    def trained(self, name: str, seed: int) -> tuple[Config, Workspace]:
        """A student and its run; the arguments of `register`, for a registered model of this name."""
        client = MlflowClient()
        experiment = client.get_experiment_by_name(self.config.tracking.experiment)
        number = experiment.experiment_id if experiment else client.create_experiment(self.config.tracking.experiment)
        run = client.create_run(number)
        torch.manual_seed(seed)
        student = Student(STUDENT, 3).eval()
        info = StudentInfo(
            to_dict(STUDENT),
            ["ce", "kd"],
            self.tiny.index.class_names,
            "dho",
            run.info.run_id,
            9,
            {"dataset": "d" * 64},
        )
        folder = self.folder / name
        workspace = Workspace(
            folder,
            prepared=self.tiny.prepared,
            teacher=self.tiny.store_folder,
            trained=folder,
            evaluated=folder,
            registered=folder / "out.json",
        )
        save_student(workspace.student, student, info)
        workspace.metrics.write_text(json.dumps({"alpha": 0.4, "beta": 0.5}))
        tree = to_dict(self.config)
        tree["registry"] = {"name": name, "rules": {"min_gain": -1.0, "max_class_drop": 1.0}}
        return from_dict(tree), workspace


@pytest.fixture(scope="module")
def house(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch, postgres() as database, s3(folder / "s3", "mlflow") as storage:
        patch.chdir(folder)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        patch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
        server = MlflowServer(folder / "mlflow", database, storage, PASSWORD)
        server.start()
        try:
            tree = {"tracking": {"uri": server.address, "experiment": "served"}}
            house = House(server, folder, from_dict(tree), tiny, patch)
            house.log_in("admin")
            for user in ("releaser", "reader"):
                AuthServiceClient(server.address).create_user(user, PASSWORD)
            house.log_in("releaser")
            yield house
        finally:
            server.kill()


def _models(client: MlflowClient, config: Config) -> list[Any]:
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    return list(client.search_logged_models([experiment.experiment_id]))


def test_a_student_is_registered_promoted_loaded_and_rolled_back_on_postgresql_and_s3(house: House) -> None:
    client = house.log_in("releaser")
    config, workspace = house.trained("whole", 0)
    first = register(config, workspace)
    assert promote(config, house.tiny.workspace).promoted
    config, workspace = house.trained("whole", 1)
    second = register(config, workspace)
    assert (first["version"], second["version"]) == (1, 2)
    assert promote(config, house.tiny.workspace).promoted
    assert client.get_model_version("whole", "2").source.startswith("models:/")
    location = client.get_logged_model(second["model_id"]).artifact_location
    assert location.startswith("mlflow-artifacts:")
    import io

    buffer = io.BytesIO()
    draw_image("circle", 1).save(buffer, "PNG")
    answer = mlflow.pyfunc.load_model("models:/whole@champion").predict(pd.DataFrame({"image": [buffer.getvalue()]}))
    assert answer["label"][0] in house.tiny.index.class_names
    assert rollback(config, "a test") == ("2", "1")
    assert [(entry["action"], entry["by"]) for entry in history(client, "whole")] == [
        ("promote", "releaser"),
        ("promote", "releaser"),
        ("rollback", "releaser"),
    ]


def test_a_user_who_may_read_can_load_and_not_promote_and_wrong_credentials_are_one_line(house: House) -> None:
    client = house.log_in("reader")
    config = from_dict(
        to_dict(house.config) | {"registry": {"name": "whole", "rules": {"min_gain": -1.0, "max_class_drop": 1.0}}}
    )
    before = client.get_registered_model("whole")
    assert mlflow.pyfunc.load_model("models:/whole@champion").metadata.metadata["heads"] == ["ce", "kd"]
    with pytest.raises(TrackingError, match="does not allow reader to do this: it cannot promote version 2") as caught:
        promote(config, house.tiny.workspace)
    assert "\n" not in str(caught.value)
    after = client.get_registered_model("whole")
    assert (before.aliases, before.tags) == (after.aliases, after.tags)
    with pytest.raises(TrackingError, match=r"refuses the credentials.*MLFLOW_TRACKING_USERNAME") as caught:
        house.log_in("reader", "wrong")
    assert "\n" not in str(caught.value) and "wrong" not in str(caught.value)
    house.log_in("releaser")


def test_a_server_killed_while_registering_leaves_one_version_and_no_alias_of_a_half_one(house: House) -> None:
    client = house.log_in("releaser")
    config, workspace = house.trained("killed", 2)
    count = len(_models(client, config))

    def dying(method: str, after: bool) -> None:
        """The server dies in, or right after, this request."""
        whole = getattr(MlflowClient, method)

        def die(self: MlflowClient, *positional: Any, **named: Any) -> Any:
            answer = whole(self, *positional, **named) if after else None
            house.server.kill()
            return answer if after else whole(self, *positional, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MlflowClient, method, die)
            with pytest.raises(TrackingError) as caught:
                register(config, workspace)
            assert "\n" not in str(caught.value)
        house.server.start()
        assert "candidate" not in client.get_registered_model("killed").aliases

    dying("log_model_artifacts", after=False)
    assert client.search_model_versions("name = 'killed'") == []
    dying("create_model_version", after=True)
    assert len(client.search_model_versions("name = 'killed'")) == 1
    done = register(config, workspace)
    assert done["version"] == 1 and len(client.search_model_versions("name = 'killed'")) == 1
    assert client.get_registered_model("killed").aliases["candidate"] in (1, "1")
    assert client.get_model_version("killed", "1").status == "READY"
    assert len(_models(client, config)) == count + 1


def test_a_server_killed_while_promoting_is_caught_up_by_the_next_promotion(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = house.log_in("releaser")
    config = from_dict(to_dict(house.config) | {"registry": {"name": "killed", "rules": {}}})
    whole = MlflowClient.set_registered_model_alias

    def die(self: MlflowClient, *arguments: Any) -> None:
        whole(self, *arguments)
        house.server.kill()

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", die)
        with pytest.raises(TrackingError, match="cannot promote version 1 of killed"):
            promote(config, house.tiny.workspace)
    house.server.start()
    assert history(client, "killed") == []
    monkeypatch.setattr(leases, "SKEW_S", -leases.LEASE_S)  # the lease of the one that died has run out
    assert promote(config, house.tiny.workspace).promoted
    assert [entry["to"] for entry in history(client, "killed")] == ["1"]
    model = client.get_registered_model("killed")
    assert str(model.aliases["champion"]) == "1" and not [key for key in model.tags if key.startswith(leases.PREFIX)]
    assert client.get_model_version("killed", "1").tags["promoted.by"] == "releaser"
