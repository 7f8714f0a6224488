"""Dual-Head Optimization (arXiv 2505.07675): few labels, many unlabelled images, a large teacher, a small fast student."""

__version__ = "0.1.0"

import os

# Read when mlflow is first imported, wherever that is: nothing about a user's runs leaves for anyone but the user's own server.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Artifacts come through the MLflow server: the S3 server behind it may have no address here, and MLflow would try it for minutes.
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
