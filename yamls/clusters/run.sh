#!/usr/bin/env bash
# Starts this node's part of a training, one process a GPU, and passes signals on to them:
#   bash yamls/clusters/run.sh YAML [key=value ...]
#   NPROC_PER_NODE=4 bash yamls/clusters/run.sh YAML [key=value ...]
#   NNODES=4 NODE_RANK=1 MASTER_ADDR=192.168.1.100 bash yamls/clusters/run.sh YAML [key=value ...]
# Every node runs it with its own NODE_RANK, from 0; MASTER_ADDR is node 0's name or address.
#   NNODES          nodes (1)
#   NODE_RANK       this node's number (0)
#   MASTER_ADDR     node 0, as the others reach it (127.0.0.1 for one node)
#   MASTER_PORT     a port of node 0 that is free (29500; for one node, one that is free)
#   NPROC_PER_NODE  processes a node, the same on all (its GPUs; 1 without)
# Exit code: 0 when trained; 143 after a SIGTERM, once saved: run it again to go on; 2 for a mistake.
set -euo pipefail

refuse() {
    echo "error: $1" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ $# -ge 1 ] || refuse "no YAML; bash yamls/clusters/run.sh YAML [key=value ...]"
[ -f "$1" ] || refuse "$1: no such file; the first argument is the run's YAML"
command -v python >/dev/null || refuse "no python on the PATH; activate the environment: source .venv/bin/activate"

for name in NNODES NODE_RANK NPROC_PER_NODE MASTER_PORT; do
    value=${!name:-}
    [[ $value =~ ^(0|[1-9][0-9]{0,5})?$ ]] || refuse "$name: got $value; it takes a number"
done
nodes=${NNODES:-1} rank=${NODE_RANK:-0} processes=${NPROC_PER_NODE:-}
[ "$nodes" -ge 1 ] || refuse "NNODES: got 0; it takes at least 1"
[ "$rank" -lt "$nodes" ] || refuse "NODE_RANK: got $rank; of NNODES=$nodes it is 0 to $((nodes - 1))"
[ "$processes" != 0 ] || refuse "NPROC_PER_NODE: got 0; it takes at least 1"
port=() address=${MASTER_ADDR:-127.0.0.1}
if [ "$nodes" -gt 1 ]; then
    [ -n "${NODE_RANK:-}" ] || refuse "NODE_RANK: none, and NNODES=$nodes; give each node its own, from 0"
    [ -n "${MASTER_ADDR:-}" ] || refuse "MASTER_ADDR: none, and NNODES=$nodes; give node 0's name or address"
    port=(--master_port "${MASTER_PORT:-29500}")
elif [ -n "${MASTER_PORT:-}" ]; then
    port=(--master_port "$MASTER_PORT")
fi
[ -n "$processes" ] || processes=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')

# All of them as flags, for those go over what a scheduler may have left in the environment.
exec python "$root/sit_composer/launch.py" -n "$processes" --world_size $((nodes * processes)) \
    --node_rank "$rank" --base_rank $((rank * processes)) --master_addr "$address" ${port[@]+"${port[@]}"} \
    "$root/sit_composer/train.py" "$@"
