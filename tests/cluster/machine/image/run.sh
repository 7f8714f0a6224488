#!/usr/bin/env bash
# Runs TAG as locked down as an orchestrator would: user 10001, root read-only but for /tmp, no capability, no network. With Docker where an
# engine answers, else with podman and runc. Usage: [FLAGS='-i -e A=b'] run.sh TAG [ARGUMENT...]
set -euo pipefail
engine=(docker run)
if ! docker info >/dev/null 2>&1; then
  # cgroupfs and file: podman may have no systemd or journald here. Limits no higher than our own: raising one needs CAP_SYS_RESOURCE.
  # podman's --read-only alone would still give a writable /run and /var/tmp.
  engine=(podman --cgroup-manager=cgroupfs --events-backend=file run --ulimit "nofile=$(ulimit -Hn):$(ulimit -Hn)" --ulimit nproc=32768:32768
          --read-only-tmpfs=false --no-healthcheck)
  if command -v runc >/dev/null; then engine=(podman --runtime=runc "${engine[@]:1}"); fi
fi
exec "${engine[@]}" --rm --pull=never --network=none --user 10001:10001 --cap-drop=ALL --security-opt=no-new-privileges \
    --read-only --tmpfs /tmp ${FLAGS-} "$@"
