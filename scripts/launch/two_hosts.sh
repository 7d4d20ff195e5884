#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a cable (veth), one torchrun in each. Needs root and iproute2.
#   scripts/launch/two_hosts.sh RECIPE [key=value ...]          PROCESSES=2 in each of the hosts (default 1)
# Shows what a real cluster needs: an address that both reach, the interface's name for gloo (NCCL: NCCL_SOCKET_IFNAME), one folder.
set -euo pipefail
# The number of this shell keeps several of these apart.
first=mmkd$$a second=mmkd$$b cable=mk$$
end() {
    for host in "$first" "$second"; do
        # A namespace lives on while something runs in it.
        ip netns pids "$host" 2>/dev/null | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
        ip netns delete "$host" 2>/dev/null || true
    done
}
trap end EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
ip netns add "$first"
ip netns add "$second"
ip link add "${cable}a" netns "$first" type veth peer name "${cable}b" netns "$second"
ip -n "$first" address add 10.77.0.1/24 dev "${cable}a"
ip -n "$second" address add 10.77.0.2/24 dev "${cable}b"
for host in a b; do
    ip -n "mmkd$$$host" link set lo up
    ip -n "mmkd$$$host" link set "$cable$host" up
done
launch() { # host, its interface, its number
    ip netns exec "$1" env GLOO_SOCKET_IFNAME="$2" torchrun --nnodes 2 --node-rank "$3" --nproc-per-node "${PROCESSES:-1}" \
        --master-addr 10.77.0.1 --master-port 29500 -m mmkd.cli distill "${@:4}"
}
launch "$second" "${cable}b" 1 "$@" &
launch "$first" "${cable}a" 0 "$@"
wait $!
