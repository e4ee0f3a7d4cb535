#!/bin/sh
# Requests per second through the gateway and through nginx as a proxy, in one run, in front of the same small nginx
# upstream; each proxy has one worker on core 0, client and upstream are on core 1. Prints a table and a JSON line.
# usage: compare.sh [ROUNDS] [SECONDS]; needs nginx, wrk, taskset and `cargo build --release --example front -p gateway`.
set -eu
rounds=${1:-3} seconds=${2:-4}
root=$(cd "$(dirname "$0")/../../.." && pwd)
front=${CARGO_TARGET_DIR:-$root/target}/release/examples/front
dir=$(mktemp -d)
pids=
trap 'for pid in $pids; do kill "$pid" 2>/dev/null || true; done; rm -rf "$dir"' EXIT INT TERM
conf() { # name, body of http
    cat > "$dir/$1.conf" <<EOF
daemon off; worker_processes 1; pid $dir/$1.pid; error_log /dev/null;
events { worker_connections 4096; }
http { access_log off; keepalive_requests 100000000; client_body_temp_path $dir/$1-b; proxy_temp_path $dir/$1-p;
 fastcgi_temp_path $dir/$1-f; uwsgi_temp_path $dir/$1-u; scgi_temp_path $dir/$1-s; $2 }
EOF
}
conf upstream 'server { listen 127.0.0.1:18081; location / { default_type text/plain; return 200 "hello, world\n"; } }'
conf proxy 'upstream u { server 127.0.0.1:18081; keepalive 256; keepalive_requests 100000000; }
 server { listen 127.0.0.1:18082; location / { proxy_http_version 1.1; proxy_set_header Connection "";
 proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr; proxy_pass http://u; } }'
taskset -c 1 nginx -c "$dir/upstream.conf" & pids="$pids $!"
taskset -c 0 nginx -c "$dir/proxy.conf" & pids="$pids $!"
taskset -c 0 "$front" 127.0.0.1:18083 127.0.0.1:18081 1 & pids="$pids $!"
for port in 18081 18082 18083; do
    until curl -sf "http://127.0.0.1:$port/" >/dev/null; do sleep 0.1; done
done
run() { # port: requests/s and the 99th percentile
    taskset -c 1 wrk -t1 -c64 -d"${seconds}s" --latency "http://127.0.0.1:$1/" |
        awk '/Requests\/sec/ {rps=$2} /99%/ {p99=$2} /Non-2xx/ {bad=$NF} END {printf "%d %s %s\n", rps, p99, bad+0}'
}
echo "round  nginx/s  p99       gateway/s  p99       ratio"
best=0
for round in $(seq "$rounds"); do
    nginx=$(run 18082) gateway=$(run 18083)
    line=$(echo "$round $nginx $gateway" | awk '{printf "%-6s %-8s %-9s %-10s %-9s %.2f (errors %s %s)", $1,$2,$3,$5,$6,$5/$2,$4,$7}')
    echo "$line"
    echo "$nginx $gateway" >> "$dir/all"
done
sort -n "$dir/all" | awk '{n[NR]=$1; g[NR]=$4; r[NR]=$4/$1} END {
    for(i=1;i<=NR;i++)for(j=i+1;j<=NR;j++)if(r[j]<r[i]){t=r[i];r[i]=r[j];r[j]=t}
    printf "{\"bench\":\"gateway-proxy\",\"peer\":\"nginx\",\"median_ratio\":%.3f}\n", r[int((NR+1)/2)]}'
