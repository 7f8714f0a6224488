#!/usr/bin/env bash
# Start a real Kubernetes cluster in a network namespace of its own: etcd, API server, controller manager, scheduler, CoreDNS, the Kubeflow
# training operator with its webhook, and N nodes (kubelet, containerd, runc). No route leads out of the namespace.
# PROGRAMS is what programs/build.sh made, STORE what load.sh filled with images. Usage: up.sh DIR PROGRAMS STORE [NODES=2]
set -euo pipefail
here=$(dirname "$(realpath "$0")"); D=$(realpath -m "$1") N=${4:-2}
mkdir -p "$D"/{certs,etcd,webhook-certs}
ln -sfn "$(realpath "$2")" "$D/programs"; ln -sfn "$(realpath "$3")" "$D/store"
export KUBECONFIG=$D/kubeconfig PATH=$D/programs/bin:$PATH
inside() { nsenter --net=/run/netns/dho "$@"; }
kc() { inside kubectl "$@"; }
until_ok() {
  local end=$((SECONDS + 240))
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { tail -n 5 "$D"/*.log >&2; echo "up.sh: timed out: $*" >&2; exit 1; }
    sleep .25
  done
}

# One bridge carries all pods; 10.250.0.1 is the control plane and DNS, 10.250.0.1N the nodes, 10.250.N.0/24 their pods.
ip netns add dho; inside ip link set lo up; inside ip link add pods type bridge; inside ip link set pods up
inside ip addr add 10.250.0.1/16 dev pods; for i in $(seq "$N"); do inside ip addr add "10.250.0.1$i/16" dev pods; done
inside ip route add 10.96.0.0/24 dev pods   # services, for what runs in this namespace itself; kube-proxy takes it from there
inside sysctl -qw net.ipv4.ip_forward=1

[ -f "$D/sa.key" ] || openssl genrsa -out "$D/sa.key" 2048 2>/dev/null
(umask 077; echo "$(openssl rand -hex 16),admin,1,\"system:masters\"" >"$D/tokens.csv"; cat >"$D/kubeconfig" <<K
apiVersion: v1
kind: Config
clusters: [{name: dho, cluster: {server: "https://10.250.0.1:6443", insecure-skip-tls-verify: true}}]
users: [{name: admin, user: {token: $(cut -d, -f1 "$D/tokens.csv")}}]
contexts: [{name: dho, context: {cluster: dho, user: admin}}]
current-context: dho
K
)
(cat /etc/hosts; echo "127.0.0.1 training-operator.kubeflow.svc") >"$D/hosts"
printf 'nameserver 10.250.0.1\nsearch svc.cluster.local cluster.local\n' >"$D/resolv.conf"
# Small, so that a test can fill it: the shared file system of namespace dho's checkpoints.
mkdir -p "$D/volumes/dho-dho-checkpoints"; mount -t tmpfs -o size=512m dho-checkpoints "$D/volumes/dho-dho-checkpoints"
cp "$here/../../../k8s/platform/operator/initContainer.yaml" "$D"
cat >"$D/Corefile" <<C
.:53 {
  bind 10.250.0.1
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $D/kubeconfig dho
    ttl 1
  }
  errors
}
C
"$here/component.sh" "$D" etcd; "$here/component.sh" "$D" apiserver
for i in $(seq "$N"); do "$here/node.sh" "$D" "$i" & done
until_ok kc get --raw /readyz
for name in controller-manager scheduler proxy coredns; do "$here/component.sh" "$D" $name; done

kc apply --server-side -f "$D/programs/manifests/kubeflow.org_pytorchjobs.yaml" >/dev/null
kc create namespace kubeflow >/dev/null; kc -n kubeflow create secret generic training-operator-webhook-cert >/dev/null
kc apply -f - >/dev/null <<'K'
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: validator.training-operator.kubeflow.org}
webhooks:
- name: validator.pytorchjob.training-operator.kubeflow.org
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  clientConfig: {url: "https://training-operator.kubeflow.svc:9443/validate-kubeflow-org-v1-pytorchjob"}
  rules: [{apiGroups: [kubeflow.org], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [pytorchjobs]}]
K
"$here/component.sh" "$D" operator
secret() { kc -n kubeflow get secret training-operator-webhook-cert -o "jsonpath={.data.${1/./\\.}}" | base64 -d; }
for _ in $(seq 120); do [ -z "$(secret tls.crt)" ] || break; sleep .5; done
# tls.crt last and whole: when that is there the operator reads all of them, and ends where one is missing.
for f in ca.crt ca.key tls.key tls.crt; do secret $f >"$D/webhook-certs/.new"; mv "$D/webhook-certs/.new" "$D/webhook-certs/$f"; done

wait   # for the nodes
# The operator looks for them after 1, 2, 4, ... s or up to twice as long, then in the same way for what it does next: that may take minutes.
until_ok inside curl -fs http://127.0.0.1:18081/readyz
for i in $(seq "$N"); do until_ok kc wait --for=condition=Ready "node/node-$i" --timeout=60s; done
for file in "$D"/*.pid "$D"/node-*/*.pid; do
  [ -e "/proc/$(cat "$file")" ] || { echo "up.sh: $(basename "$file" .pid) ended: $(tail -n 3 "${file%.pid}.log")" >&2; exit 1; }
done
kc get nodes
