#!/usr/bin/env bash
# Start node I of the cluster in DIR, or start it again after lose.sh: a containerd and a kubelet of its own. Usage: node.sh DIR I
set -euo pipefail
D=$(realpath "$1") I=$2; W=$D/node-$I; mkdir -p "$W"/{state,kubelet,cni}; export PATH=$D/programs/bin:$PATH
# The images were unpacked once, into the store; every node has them by hard links (a container's own layer lies above and never writes to them).
if [ ! -e "$W/root" ]; then
  rm -rf "$W/root.partial"; cp -al "$D/store/root" "$W/root.partial"
  find "$W/root.partial" -maxdepth 2 -name '*.db' -exec sh -c 'cp "$1" "$1.own"; mv "$1.own" "$1"' sh {} \;   # these containerd does write to
  mv "$W/root.partial" "$W/root"
fi
# restrict_oom_score_adj: without CAP_SYS_RESOURCE a container's oom score can't be lowered.
cat >"$W/containerd.toml" <<C
version = 2
root = "$W/root"
state = "$W/state"
[grpc]
  address = "$W/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$W/cni"
C
cat >"$W/cni/pods.conflist" <<C
{"cniVersion": "0.4.0", "name": "node-$I", "plugins": [{"type": "bridge", "bridge": "pods", "ipam": {"type": "host-local",
 "dataDir": "$W/ipam", "ranges": [[{"subnet": "10.250.0.0/16", "rangeStart": "10.250.$I.2", "rangeEnd": "10.250.$I.250", "gateway": "10.250.0.1"}]], "routes": [{"dst": "10.96.0.0/24"}]}}]}
C
cat >"$W/kubelet.yaml" <<C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix://$W/containerd.sock
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
featureGates: {InPlacePodVerticalScaling: false}
failSwapOn: false
failCgroupV1: false
clusterDNS: [10.250.0.1]
clusterDomain: cluster.local
resolvConf: ""
address: 10.250.0.1$I
port: 10250
healthzPort: 0
podLogsDir: $W/logs
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 2s
C
start() { local name=$1; shift; setsid nsenter --net=/run/netns/dho "$@" >>"$W/$name.log" 2>&1 & echo $! >"$W/$name.pid"; }
start containerd containerd -c "$W/containerd.toml"
for _ in $(seq 240); do if ctr -a "$W/containerd.sock" version >/dev/null 2>&1; then break; fi; sleep .25; done
start kubelet kubelet --config "$W/kubelet.yaml" --kubeconfig "$D/kubeconfig" --root-dir "$W/kubelet" --cert-dir "$W/certs" --hostname-override "node-$I" --node-ip "10.250.0.1$I"
