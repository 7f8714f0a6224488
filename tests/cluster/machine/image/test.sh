#!/usr/bin/env bash
# Checks the image TAG from the inside, locked down as in a cluster (run.sh): its version, a training of 20 steps and a prediction.
# Usage: test.sh TAG
set -euo pipefail
tag=$1 here=$(dirname "$(realpath "$0")"); root=$here/../../../..
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
run() { FLAGS="--volume $work:/work ${FLAGS-}" "$here/run.sh" "$tag" "$@"; }

said=$(run --version)
expected=dho\ $(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
[ "$said" = "$expected" ] || { echo "test.sh: the image says '$said', pyproject.toml '$expected'" >&2; exit 1; }

cp "$here/train_in_image.py" "$work"; chmod -R a+rwX "$work"
FLAGS="--entrypoint python" run train_in_image.py
FLAGS="--entrypoint sh" run -c '! touch /opt/dho/written 2>/dev/null && ! command -v gcc && ! command -v uv && ! ls /root/.cache /var/lib/apt/lists/* 2>/dev/null' ||
  { echo "test.sh: the root can be written to, or a compiler, uv or a cache is in the image" >&2; exit 1; }
echo "test.sh: $tag: $said, a training and a prediction as user 10001, read-only, without capabilities and network"
