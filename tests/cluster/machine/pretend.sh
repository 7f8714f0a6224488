#!/usr/bin/env bash
# Add N nodes that only pretend (kwok) to the cluster in DIR, each with GPUS GPUs: pods bound to them are reported as running, nothing runs.
# Usage: pretend.sh DIR N [GPUS=8]
set -euo pipefail
D=$(realpath "$1") N=$2 G=${3:-8}
"$(dirname "$(realpath "$0")")/component.sh" "$D" kwok
for i in $(seq "$N"); do cat <<K
---
apiVersion: v1
kind: Node
metadata: {name: gpu-$i, annotations: {kwok.x-k8s.io/node: fake}, labels: {kubernetes.io/hostname: gpu-$i, kubernetes.io/os: linux, nvidia.com/gpu.present: "true"}}
spec: {taints: [{key: nvidia.com/gpu, effect: NoSchedule}]}
status: {allocatable: &a {cpu: "96", memory: 1Ti, pods: "110", nvidia.com/gpu: "$G"}, capacity: *a}
K
done | nsenter --net=/run/netns/dho "$D/programs/bin/kubectl" --kubeconfig "$D/kubeconfig" apply -f - >/dev/null
