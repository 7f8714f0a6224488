#!/usr/bin/env bash
# What a downstream team does: a fresh environment with mlflow-skinny and the model's own requirements, neither torch nor this repository.
# Run by `make downstream-test`, after `make repro`. It promotes the candidate first where there is no champion yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
source .venv/bin/activate
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR=false MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
work=$(mktemp -d)
name=$(python -c 'from dho.config import load; print(load().registry.name)')
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port "$port" --workers 1 >"$work/server.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 120); do curl -fs "http://127.0.0.1:$port/health" >/dev/null && break; sleep 1; done
curl -fs "http://127.0.0.1:$port/health" >/dev/null || { cat "$work/server.log" >&2; exit 1; }

dho registry >"$work/versions"
grep -q champion "$work/versions" || dho promote
python tests/downstream/images.py "$work/images" "$work/expected.json"

export MLFLOW_TRACKING_URI="http://127.0.0.1:$port"
mkdir "$work/team"
mlflow artifacts download -u "models:/$name@champion" -d "$work/requirements" >/dev/null
.uv/bin/uv venv -q --python python3 "$work/team/venv"
.uv/bin/uv pip install -q --python "$work/team/venv/bin/python" -r "$work/requirements/requirements.txt"
cp tests/downstream/predict.py "$work/team/"
cd "$work/team"
env -u VIRTUAL_ENV -u PYTHONPATH PATH="$work/team/venv/bin:/usr/bin:/bin" venv/bin/python predict.py "models:/$name@champion" "$work/images" "$work/expected.json"
python3 -c 'import base64, json, pathlib, sys; image = next(pathlib.Path(sys.argv[1]).iterdir()).read_bytes()
print(json.dumps({"dataframe_records": [{"image": base64.b64encode(image).decode()}], "params": {"top_k": 2}}))' "$work/images" >request.json
env -u VIRTUAL_ENV -u PYTHONPATH PATH="$work/team/venv/bin:/usr/bin:/bin" \
  venv/bin/mlflow models predict -m "models:/$name@champion" -i request.json -t json --env-manager local
echo
"$OLDPWD/.uv/bin/uv" pip list -q --python venv/bin/python
du -sh venv | cut -f1
