#!/usr/bin/env bash
# Stop the cluster in DIR and remove its network namespace, mounts and files; nothing to do where none runs. Usage: down.sh DIR
set -euo pipefail
D=$(realpath -m "$1"); here=$(dirname "$(realpath "$0")")
[ -d "$D" ] || exit 0
for node in "$D"/node-*; do [ ! -d "$node" ] || "$here/lose.sh" "$D" "${node##*-}"; done
for file in "$D"/*.pid; do
  # A file left from before a reboot may name another's process by now.
  if [ -f "$file" ] && grep -qsF "$D/" "/proc/$(cat "$file")/cmdline"; then kill -9 "$(cat "$file")" 2>/dev/null || true; fi
done
sleep .5
awk -v d="$D/" 'index($2, d) == 1 {print $2}' /proc/mounts | sort -r | xargs -r umount -l
if [ -e /run/netns/dho ]; then
  # Each pod's namespace has its other end on the cluster's bridge; of some that were being made or removed only the file is left.
  for pod in $(ls /run/netns | grep '^cni-' || true); do
    if ! addresses=$(ip -n "$pod" -4 -o addr show 2>/dev/null) || grep -q ' 10\.250\.' <<<"$addresses"; then ip netns del "$pod" 2>/dev/null || rm -f "/run/netns/$pod"; fi
  done
  ip netns del dho
fi
for _ in 1 2 3; do if rm -rf "$D" 2>/dev/null; then exit 0; fi; sleep 1; done   # what was killed may have had a file under way
rm -rf "$D"
