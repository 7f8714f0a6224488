#!/usr/bin/env bash
# Start one program of the control plane of the cluster in DIR, in the cluster's network namespace. NAME is etcd, apiserver,
# controller-manager, scheduler, proxy, coredns, operator or kwok. Usage: component.sh DIR NAME      (stop it: kill -9 "$(cat DIR/NAME.pid)")
set -euo pipefail
D=$(realpath "$1") name=$2; export PATH=$D/programs/bin:$PATH KUBECONFIG=$D/kubeconfig
start() { setsid nsenter --net=/run/netns/dho "$@" >>"$D/$name.log" 2>&1 & echo $! >"$D/$name.pid"; }

case $name in
  etcd) start etcd --data-dir "$D/etcd" --unsafe-no-fsync --log-level warn ;;
  # The operator's webhook certificate is made out to its Service's name; the API server finds that name in a hosts file of its own.
  apiserver) start unshare -m sh -c 'mount --bind "$1" /etc/hosts; shift; exec "$@"' sh "$D/hosts" \
    kube-apiserver --etcd-servers=http://127.0.0.1:2379 --bind-address=10.250.0.1 --advertise-address=10.250.0.1 --cert-dir="$D/certs" \
    --service-cluster-ip-range=10.96.0.0/24 --authorization-mode=RBAC --kubelet-preferred-address-types=InternalIP --token-auth-file="$D/tokens.csv" \
    --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$D/sa.key" --service-account-signing-key-file="$D/sa.key" ;;
  controller-manager) start kube-controller-manager --kubeconfig="$D/kubeconfig" --use-service-account-credentials --cert-dir="$D/certs" \
    --service-account-private-key-file="$D/sa.key" --node-monitor-grace-period=12s --node-monitor-period=2s --leader-elect=false ;;
  scheduler) start kube-scheduler --kubeconfig="$D/kubeconfig" --cert-dir="$D/certs" --leader-elect=false ;;
  # One kube-proxy serves all nodes, which share this namespace; replies between pods of one bridge come back through it by masquerading.
  proxy) start kube-proxy --kubeconfig="$D/kubeconfig" --hostname-override=node-1 --proxy-mode=nftables --cluster-cidr=10.250.0.0/16 \
    --masquerade-all --conntrack-max-per-core=0 --healthz-bind-address=127.0.0.1:10256 ;;
  coredns) start coredns -conf "$D/Corefile" ;;
  # The operator writes its certificate to a Secret that its pod would mount; here up.sh copies it to the folder the operator reads.
  operator) start unshare -m sh -c 'mkdir -p /tmp/k8s-webhook-server/serving-certs; mount --bind "$1" /tmp/k8s-webhook-server/serving-certs; shift; exec "$@"' sh \
    "$D/webhook-certs" training-operator.v1 --enable-scheme=pytorchjob --metrics-bind-address=127.0.0.1:18080 --health-probe-bind-address=127.0.0.1:18081 \
    --pytorch-init-container-image=localhost/init:1 --pytorch-init-container-template-file="$D/initContainer.yaml" ;;
  kwok) start kwok --kubeconfig "$D/kubeconfig" --manage-nodes-with-annotation-selector kwok.x-k8s.io/node=fake --server-address 127.0.0.1:10247 \
    $(printf -- '-c %s ' "$D"/programs/manifests/kwok/*.yaml) ;;
  *) echo "component.sh: no component $name" >&2; exit 2 ;;
esac
