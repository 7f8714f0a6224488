"""MLflow: the server, the run of a training, and where a run comes from."""

import os
import sys

# mlflow reads these when it is first imported, which is after this.
# No data about a user's runs may go anywhere but to the user's own server.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Artifacts come through the MLflow server: the S3 server behind it may be out of reach; MLflow would try for minutes.
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
if not sys.stderr.isatty():
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
