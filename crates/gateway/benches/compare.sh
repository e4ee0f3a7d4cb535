#!/bin/sh
# Requests per second through the gateway and through nginx as a proxy, in one run, in front of the same small nginx
# upstream; each proxy has one worker on core 0, client and upstream are on core 1. Prints a table and a JSON line. On a
# busy machine only the CPU time per request says something ("ratio cpu": nginx's over the gateway's; above 1 is better).
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
taskset -c 0 nginx -c "$dir/proxy.conf" & nginx_pid=$! pids="$pids $!"
taskset -c 0 "$front" 127.0.0.1:18083 127.0.0.1:18081 1 & front_pid=$! pids="$pids $!"
for port in 18081 18082 18083; do
    until curl -sf "http://127.0.0.1:$port/" >/dev/null; do sleep 0.1; done
done
ticks() { # CPU time of a process and its children, in clock ticks
    cat "/proc/$1/stat" $(pgrep -P "$1" | sed 's|.*|/proc/&/stat|') | sed 's/.*) //' | awk '{sum += $12 + $13} END {print sum}'
}
run() { # port, pid: requests/s, CPU microseconds per request, the 99th percentile, errors
    before=$(ticks "$2")
    wrk=$(taskset -c 1 wrk -t1 -c64 -d"${seconds}s" --latency "http://127.0.0.1:$1/")
    after=$(ticks "$2")
    echo "$wrk" | awk -v ticks=$((after - before)) -v hz="$(getconf CLK_TCK)" '/requests in/ {all=$1} /Requests\/sec/ {rps=$2}
        /99%/ {p99=$2} /Non-2xx/ {bad=$NF} END {printf "%d %.1f %s %s\n", rps, ticks / hz * 1e6 / all, p99, bad+0}'
}
echo "round  nginx/s  cpu us  p99       gateway/s  cpu us  p99       ratio/s  ratio cpu"
for round in $(seq "$rounds"); do
    nginx=$(run 18082 "$nginx_pid") gateway=$(run 18083 "$front_pid")
    echo "$round $nginx $gateway" | awk '{printf "%-6s %-8s %-7s %-9s %-10s %-7s %-9s %-8.2f %.2f (errors %s %s)\n",
        $1,$2,$3,$4,$6,$7,$8,$6/$2,$3/$7,$5,$9}'
    echo "$nginx $gateway" >> "$dir/all"
done
median() { sort -n | awk '{v[NR]=$1} END {printf "%.3f", v[int((NR+1)/2)]}'; }
rate=$(awk '{print $5/$1}' "$dir/all" | median) cpu=$(awk '{print $2/$6}' "$dir/all" | median)
echo "{\"bench\":\"gateway-proxy\",\"peer\":\"nginx\",\"median_ratio\":$rate,\"median_ratio_per_cpu\":$cpu}"
