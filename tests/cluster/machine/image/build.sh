#!/usr/bin/env bash
# Builds FOLDER/Dockerfile as TAG: with Docker where an engine answers, else with buildah on a base image made here (base.sh). For buildah, this
# machine's CA bundle and package index are mounted for the build only and never written into the image. Usage: build.sh FOLDER TAG [FLAG...]
set -euo pipefail
context=$1 tag=$2; shift 2
here=$(dirname "$(realpath "$0")")
if docker info >/dev/null 2>&1; then exec docker build --tag "$tag" "$@" "$context"; fi
command -v buildah >/dev/null || { echo "build.sh: needs Docker, or buildah (Debian: apt-get install buildah podman runc debootstrap)" >&2; exit 1; }
"$here/base.sh" >/dev/null

bundle=/etc/ssl/certs/ca-certificates.crt   # where Debian, and so the base image, keeps it
settings=$(mktemp -d); trap 'rm -rf "$settings"' EXIT
mkdir "$settings/pip" "$settings/uv"
# pip: the effective settings of this machine (environment first, then its files)
python=$(type -ap python3 | while read -r path; do if "$path" -m pip --version >/dev/null 2>&1; then echo "$path"; break; fi; done)
{ echo '[global]'; echo "cert = $bundle"
  "$python" -m pip config list | sort | sed -nE "s/^(:env:|global|install)\.(index-url|extra-index-url|trusted-host|(default-)?timeout)='(.*)'$/\2 = \4/p" |
    sed 's/^default-//; s/\\n/ /g' | awk -F' = ' '!seen[$1]++'; } >"$settings/pip/pip.conf"
# uv: the system's certificates, and pip's index or uv's own
index=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-$(sed -n 's/^index-url = //p' "$settings/pip/pip.conf")}}
{ echo 'native-tls = true'; [ -z "$index" ] || echo "index-url = \"$index\""; } >"$settings/uv/uv.toml"
chmod -R a+rX "$settings"

buildah bud --layers --force-rm --pull=never --isolation=chroot --format=docker --tag "$tag" \
    --volume "${SSL_CERT_FILE:-$bundle}:$bundle:ro" \
    --volume "$settings/pip:/etc/xdg/pip:ro" --volume "$settings/uv:/etc/xdg/uv:ro" "$@" "$context"
