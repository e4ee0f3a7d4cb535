#!/bin/bash
# The demo: brings up Atoll, prepares the shop's real inputs, applies examples/shop and shows what it does.
# Ctrl-C stops and cleans up. DEMO_EXIT=1: exit by itself, 0 only if every shown step succeeded.
set -uo pipefail
cd "$(dirname "$0")/.."
ATOLL=${ATOLL:-$PWD/target/release/atoll}
CACHE=$PWD/.cache/shop
DATA=${DEMO_DATA:-$PWD/.cache/demo}
API=${DEMO_API:-127.0.0.1:7443} GATEWAY=${DEMO_GATEWAY:-127.0.0.1:8080} REGISTRY=127.0.0.1:5000
export KUBECONFIG=$DATA/kubeconfig
LOG=$PWD/.cache/demo.log

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' off=$'\e[0m'; else bold='' dim='' red='' off=''; fi
say() { printf '\n%s== %s%s\n' "$bold" "$1" "$off"; }
note() { printf '%s   %s%s\n' "$dim" "$1" "$off"; }
up_pid=
failed=0

clean_up() {
    trap - EXIT INT TERM
    say "Cleaning up"
    "$ATOLL" down --data-dir "$DATA" || failed=1
    [ -n "$up_pid" ] && wait "$up_pid" 2>/dev/null
    [ "$failed" -eq 0 ] && rm -rf "$DATA"
    exit "$failed"
}
give_up() {
    printf '%sThe demo failed: %s%s\n' "$red" "$1" "$off" >&2
    failed=1
    { echo "-- last lines of atoll up ($LOG):"; tail -n 40 "$LOG"
      echo "-- pods:"; kubectl get pods -A -o wide; kubectl get events -A | tail -n 30; } >&2 2>/dev/null
    clean_up
}
# Shows a command, runs it; a failure ends the demo.
shown() {
    printf '%s$ %s%s\n' "$bold" "$*" "$off"
    "$@" || give_up "$*"
}
start_up() {
    "$ATOLL" up --data-dir "$DATA" --api-addr "$API" --gateway-addr "$GATEWAY" --registry-addr "$REGISTRY" >>"$LOG.out" 2>>"$LOG" &
    up_pid=$!
    for _ in $(seq 200); do
        grep -q '^ready' "$LOG.out" && break
        kill -0 "$up_pid" 2>/dev/null || give_up "atoll up ended"
        sleep 0.05
    done
    grep '^ready' "$LOG.out" | tail -n 1 || give_up "atoll up is not ready"
    : >"$LOG.out"
}
# Waits for a condition with a progress line every few seconds: until_true SECONDS WHAT COMMAND...
until_true() {
    local limit=$1 what=$2 begun=$SECONDS told=0
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $((SECONDS - begun)) -ge "$limit" ] && give_up "$what: not after $limit s"
        if [ $((SECONDS - begun)) -ge $((told + 5)) ]; then
            told=$((SECONDS - begun))
            note "waiting for $what, $told s: $(kubectl get pods -n shop --no-headers 2>/dev/null | awk '{printf "%s %s %s; ", $1, $2, $3}')"
        fi
        sleep 1
    done
    note "$what: after $((SECONDS - begun)) s"
}
shop() { curl -fsS --max-time 30 -H 'Host: shop.localhost' "http://$GATEWAY$1"; }

[ "$(id -u)" -eq 0 ] || { echo "make demo needs root: sudo make demo" >&2; exit 1; }
mkdir -p .cache

say "What this machine offers"
shown "$ATOLL" doctor

say "Real inputs (made once, kept in .cache/shop)"
note "catalog: its base, Python from Debian packages, as a root file system"
examples/shop/catalog/build.sh "$CACHE" || give_up "catalog base"
note "pricing: a wasi:http component built from JavaScript"
examples/shop/pricing/build.sh || give_up "pricing component"
note "orders: Debian with PostgreSQL on a disk image of its own, with its kernel"
examples/shop/orders/build.sh "$CACHE" || give_up "orders disk"

say "One command brings up the cloud"
[ -e "$DATA/version" ] && "$ATOLL" down --data-dir "$DATA" >/dev/null 2>&1
rm -rf "$DATA"
: >"$LOG"; : >"$LOG.out"
trap clean_up EXIT INT TERM
printf '%s$ atoll up --data-dir %s%s\n' "$bold" "$DATA" "$off"
start_up

say "Images into the store"
shown "$ATOLL" image import --data-dir "$DATA" "$CACHE/python.tar" --tag shop/python:1
shown "$ATOLL" image build --data-dir "$DATA" -t "$REGISTRY/shop/catalog:1" examples/shop/catalog
shown "$ATOLL" image import --data-dir "$DATA" examples/shop/pricing/pricing.wasm --tag "$REGISTRY/shop/pricing:1"
shown "$ATOLL" image import --data-dir "$DATA" "$CACHE/orders.raw" --tag shop/orders:1
shown "$ATOLL" image import --data-dir "$DATA" "$CACHE/orders-kernel.tar" --tag shop/orders-kernel:1
shown skopeo list-tags --tls-verify=false "docker://$REGISTRY/shop/catalog"
shown "$ATOLL" image ls --data-dir "$DATA"

say "One YAML runs a VM, containers and a function"
shown kubectl apply -f examples/shop
until_true 300 "the function" kubectl wait -n shop ksvc/pricing --for=condition=Ready --timeout=1s
until_true 300 "the virtual machine" kubectl wait -n shop vm/orders --for=condition=Ready --timeout=1s
until_true 300 "the catalog" kubectl rollout status -n shop deployment/catalog --timeout=1s
until_true 60 "the route" shop /catalog

say "Everything there is"
shown kubectl get nodes,runtimeclasses,gatewayclasses,gateways -A
shown kubectl get -n shop vm,vmi,ksvc,revisions,deployments,replicasets,pods,services,endpointslices,httproutes,configmaps,secrets -o wide

say "One request: route -> container -> the VM's database -> function"
printf '%s$ curl -H "Host: shop.localhost" http://%s/catalog%s\n' "$bold" "$GATEWAY" "$off"
answer=$(shop /catalog) || give_up "request to the catalog"
echo "$answer"
[ "$(jq '.products | length' <<<"$answer")" -eq 3 ] || give_up "the catalog should have three products"
jq -e '.products[0].price.total' <<<"$answer" >/dev/null || give_up "the products should have prices"
printf '%s$ curl -H "Host: shop.localhost" "http://%s/price?sku=kite&cents=3500&qty=10"%s\n' "$bold" "$GATEWAY" "$off"
shop '/price?sku=kite&cents=3500&qty=10' || give_up "request to the function"
echo

say "Logs of each"
shown kubectl logs -n shop deployment/catalog --tail=3
shown kubectl logs -n shop -l serving.knative.dev/service=pricing --tail=3
shown kubectl logs -n shop -l app=orders --tail=3

say "Inside a container"
shown kubectl exec -n shop deployment/catalog -- /bin/sh -c 'id; cat /etc/resolv.conf; cat /proc/self/uid_map'

say "Scale to three"
shown kubectl scale -n shop deployment/catalog --replicas=3
shown kubectl rollout status -n shop deployment/catalog --timeout=90s
shown kubectl get pods -n shop -l app=catalog -o wide

say "Kill -9 atoll up in the middle: workloads never notice"
before=$(kubectl get pods -n shop -o json | jq -c '[.items[] | [.metadata.name, .status.containerStatuses[0].containerID, .status.containerStatuses[0].restartCount]] | sort')
shown kill -9 "$up_pid"
wait "$up_pid" 2>/dev/null
printf '%s$ atoll up --data-dir %s%s\n' "$bold" "$DATA" "$off"
start_up
until_true 60 "the route again" shop /catalog
after=$(kubectl get pods -n shop -o json | jq -c '[.items[] | [.metadata.name, .status.containerStatuses[0].containerID, .status.containerStatuses[0].restartCount]] | sort')
[ "$before" = "$after" ] || give_up "workloads changed over the restart: $before -> $after"
note "the same $(jq length <<<"$after") pods, the same containers, no restarts"

say "The shop is open"
note "kubeconfig: export KUBECONFIG=$KUBECONFIG"
note "gateway:    curl -H 'Host: shop.localhost' http://$GATEWAY/catalog"
note "console:    kubectl attach -it -n shop \$(kubectl get pod -n shop -l app=orders -o name)"
if [ "${DEMO_EXIT:-0}" != 0 ]; then
    clean_up
fi
note "Ctrl-C stops and cleans up"
wait "$up_pid"
failed=1
