#!/usr/bin/env bash
# Unpack container images, from Docker or buildah, into STORE, a containerd root that every node of the cluster starts with. Each layer is
# unpacked once and then kept in that form only; an image that is already there costs nothing. NODES: sockets of running nodes that began
# with the store and get what is new as well. Usage: [NODES='SOCKET...'] load.sh STORE IMAGE...
set -euo pipefail
S=$(realpath -m "$1"); shift; mkdir -p "$S"/{root,ids,layers}
W=$(mktemp -d); socket=$W/containerd.sock
cat >"$W/containerd.toml" <<C
version = 2
root = "$S/root"
state = "$W/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "$socket"
C
containerd -c "$W/containerd.toml" >"$S/containerd.log" 2>&1 & daemon=$!
trap 'kill $daemon 2>/dev/null; wait $daemon 2>/dev/null; rm -rf "$W" "$S/layout"' EXIT
c() { ctr -a "$socket" -n k8s.io "$@"; }
for _ in $(seq 120); do if c version >/dev/null 2>&1; then break; fi; sleep .25; done

# While an image is replaced nothing else names the layers that it shares with the new one; without a name containerd may remove them.
import() {
  ctr -a "$1" -n k8s.io images tag --force "$image" localhost/before >/dev/null 2>&1 || true
  ctr -a "$1" -n k8s.io images import - >/dev/null
  ctr -a "$1" -n k8s.io images rm localhost/before >/dev/null 2>&1 || true
}

docker=; if docker info >/dev/null 2>&1; then docker=yes; fi
for image; do
  if [ "$docker" ]; then id=$(docker image inspect --format '{{.Id}}' "$image"); else id=$(buildah inspect --type image --format '{{.FromImageID}}' "$image"); fi
  name=${image//[^a-zA-Z0-9.]/_}
  if [ "$(cat "$S/ids/$name" 2>/dev/null)" = "$id" ]; then continue; fi
  echo "load.sh: $image" >&2
  find "$S/layers" -type f -exec cat {} + | sort -u >"$W/have"
  rm -f "$S/ids/$name" "$S/layers/$name"
  if [ "$docker" ]; then
    for target in "$socket" ${NODES-}; do docker save "$image" | import "$target"; done
  else
    # podman exports no layer that its target has: where the store has it unpacked already, an empty file of its size stands in.
    rm -rf "$S/layout"; mkdir -p "$S/layout/blobs/sha256"
    while read -r layer size; do truncate -s "$size" "$S/layout/blobs/sha256/$layer"; done <"$W/have"
    podman --cgroup-manager=cgroupfs --events-backend=file save --quiet --format oci-dir --uncompressed --output "$S/layout" "$image"
    while read -r layer _; do rm "$S/layout/blobs/sha256/$layer"; done <"$W/have"
    once=--remove-files; [ -z "${NODES-}" ] || once=
    for target in "$socket" ${NODES-}; do tar -C "$S/layout" $once -cf - blobs index.json oci-layout | import "$target"; done
    rm -rf "$S/layout"
  fi
  manifest=$(c images ls "name==$image" | awk 'NR == 2 {print $3}')
  c content get "$manifest" |
    python3 -c 'import json, sys; [print(layer["digest"].split(":")[1], layer["size"]) for layer in json.load(sys.stdin)["layers"]]' >"$W/layers"
  while read -r layer _; do c content rm "sha256:$layer" >/dev/null 2>&1 || true; done <"$W/layers"   # another image's, gone already: fine
  mv "$W/layers" "$S/layers/$name"; echo "$id" >"$S/ids/$name"
done
c leases create --id collect >/dev/null; c leases delete --sync collect >/dev/null   # containerd removes what nothing names any more
