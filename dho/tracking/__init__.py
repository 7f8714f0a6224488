"""MLflow: the server, the run of a training, and where a run comes from."""
