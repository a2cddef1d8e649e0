"""MLflow's model registry: exported checkpoints as versions of a registered model."""

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from q3q.errors import NotRegisteredError, TrackingError
from q3q.export.marker import digest_faults
from q3q.masking import masked
from q3q.record import TrialRecord
from q3q.track.mlflow_store import MlflowStore

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

MAX_NAME = 256  # characters
NAME = r"[^/:'\"\\\x00-\x1f]*[^/:'\"\\\x00-\x1f. ]"  # with quotes it could not be searched for
REMOTE = tuple(
    "mlflow-artifacts s3 gs wasbs abfss dbfs hdfs http https ftp sftp r2".split()
)  # artifact stores that a registry can reach


def check_registry(store: MlflowStore, model: str) -> None:
    """Check that a registry takes the model's name, and can reach the experiment's artifacts.

    Raises:
        TrackingError: it does not, or they are local files.
    """
    if len(model) > MAX_NAME or not re.fullmatch(NAME, model):
        raise TrackingError(
            f"track.register={model}: MLflow takes names of at most {MAX_NAME} characters without "
            "slashes, colons and quotes; give another one"
        )
    if store.is_file:
        place = "files on this machine alone"
    else:
        location = store.artifact_location()
        if urlsplit(location).scheme in REMOTE:
            return
        place = f"those of the experiment {store.experiment} in {location}, a folder of its machine"
    raise TrackingError(
        f"track.register={model} needs a remote artifact store, and "
        f"track.uri={masked(store.uri)} keeps {place}: give a server "
        "(track.uri=http://HOST:PORT, mlflow server --artifacts-destination PLACE) and an "
        "experiment that was made there (track.experiment=NAME), or leave it out"
    )


def register(client: "MlflowClient", model: str, run: str, record: TrialRecord) -> None:
    """Upload the record's checkpoint and make it a version of the model, unless it is one.

    Raises:
        NotRegisteredError: its files are not those that were published.
    """
    sha256 = str(record.notes.get("export", {}).get("sha256", ""))
    tags = {"q3q.trial": record.spec.id, "q3q.export.sha256": sha256}
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    for version in client.search_model_versions(f"name = '{model}'"):
        if tags.items() <= version.tags.items() and version.status == "READY":
            return
    folder = record.placement.export
    present = folder is not None and folder.is_dir()
    fault = next(digest_faults(folder), None) if folder and present else "it is missing"
    if fault is not None:
        raise NotRegisteredError(
            f"{model} has no version of trial {record.spec.id}: the export {folder} is damaged "
            f"({fault}). Remove the folder: the same command makes and registers it"
        )
    client.log_artifacts(run, str(folder), "checkpoint")
    source = f"{client.get_run(run).info.artifact_uri}/checkpoint"
    client.create_model_version(model, source, run_id=run, tags=tags)
