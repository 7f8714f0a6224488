#!/usr/bin/env bash
# Lose node I of the cluster in DIR: every process of it dies at once, as when the power goes. Usage: lose.sh DIR I
set -euo pipefail
W=$(realpath "$1")/node-$2
tree() { local child; for child in $(pgrep -P "$1"); do tree "$child"; done; echo "$1"; }
pids=
for shim in $(pgrep -x containerd-shim || true); do
  if grep -qsF "$W/containerd.sock" "/proc/$shim/cmdline"; then pids+=" $(tree "$shim")"; fi
done
for name in kubelet containerd; do
  if [ -f "$W/$name.pid" ] && grep -qsF "$W/" "/proc/$(cat "$W/$name.pid")/cmdline"; then pids+=" $(cat "$W/$name.pid")"; fi
  rm -f "$W/$name.pid"
done
[ -z "$pids" ] || kill -9 $pids 2>/dev/null || true   # some die with their parents before it is their turn
