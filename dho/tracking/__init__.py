"""MLflow: the server, the run of a training, and where a run comes from."""

import os

# Read when mlflow is first imported, wherever that is: nothing about a user's runs leaves for anyone but the user's own
# server.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Artifacts come through the MLflow server: the S3 server behind it may have no address here, and MLflow would try it
# for minutes.
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
