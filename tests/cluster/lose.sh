#!/usr/bin/env bash
# Lose node I of the cluster in DIR: every process of it dies at once, as when the power goes. Usage: lose.sh DIR I
set -euo pipefail
W=$(realpath "$1")/node-$2
tree() { local child; for child in $(pgrep -P "$1"); do tree "$child"; done; echo "$1"; }
pids=
for shim in $(pgrep -x containerd-shim || true); do
  if tr '\0' ' ' <"/proc/$shim/cmdline" 2>/dev/null | grep -qF -- "-address $W/containerd.sock"; then pids+=" $(tree "$shim")"; fi
done
for name in kubelet containerd; do
  if [ -f "$W/$name.pid" ] && tr '\0' ' ' <"/proc/$(cat "$W/$name.pid")/cmdline" 2>/dev/null | grep -qF "$W/"; then pids+=" $(cat "$W/$name.pid")"; fi
  rm -f "$W/$name.pid"
done
[ -z "$pids" ] || kill -9 $pids 2>/dev/null || true   # some die with their parents before it is their turn
