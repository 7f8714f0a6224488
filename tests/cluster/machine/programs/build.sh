#!/usr/bin/env bash
# Build the programs of the test cluster from Go modules (pinned by the go.mod and go.sum of each folder here) into FOLDER/bin, and put the
# operator's CRDs and kwok's stages into FOLDER/manifests. About 10 minutes on 2 cores the first time. Usage: build.sh FOLDER
set -euo pipefail
out=$(realpath -m "$1"); here=$(dirname "$(realpath "$0")")
command -v go >/dev/null || { echo "build.sh: needs Go 1.26 or newer: https://go.dev/dl" >&2; exit 1; }
rm -rf "$out.partial"; mkdir -p "$out.partial"/{bin,manifests}

for program in kubernetes training-operator coredns kwok; do
  flags="-s -w"
  # Kubernetes without a version calls itself v0.0.0, which kubelet and kubectl refuse to work with.
  if [ $program = kubernetes ]; then
    version=$(cd "$here/kubernetes" && go list -mod=readonly -m -f '{{.Version}}' k8s.io/kubernetes)
    IFS=.v read -r _ major minor _ <<<"$version"
    prefix=k8s.io/component-base/version
    flags+=" -X $prefix.gitVersion=$version -X $prefix.gitMajor=$major -X $prefix.gitMinor=$minor"
  fi
  echo "build.sh: $program" >&2
  (cd "$here/$program" && go build -mod=readonly -trimpath -ldflags "$flags" -o "$out.partial/bin/" tool)
done
mv "$out.partial/bin/server" "$out.partial/bin/etcd"   # go build names it after the module's folder

(cd "$here/pause" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$out.partial/bin/pause" .)

module() { (cd "$here/$1" && go list -mod=readonly -m -f '{{.Dir}}' "$2"); }
install -m 644 -t "$out.partial/manifests" "$(module training-operator github.com/kubeflow/training-operator)"/manifests/base/crds/kubeflow.org_pytorchjobs.yaml
stages=$(module kwok sigs.k8s.io/kwok)/kustomize/stage
for stage in "$stages"/pod/general "$stages"/node/{fast,heartbeat}; do
  find "$stage" -maxdepth 1 -name '*.yaml' ! -name kustomization.yaml -exec install -m 644 -Dt "$out.partial/manifests/kwok" {} +
done
rm -rf "$out"; mv "$out.partial" "$out"
