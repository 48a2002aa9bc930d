#!/usr/bin/env bash
# Starts this node's ranks, one process per GPU, and passes signals on to them:
#   bash yamls/clusters/run.sh YAML [key=value ...]
#   NPROC_PER_NODE=4 bash yamls/clusters/run.sh YAML [key=value ...]
#   NNODES=4 NODE_RANK=1 MASTER_ADDR=192.168.1.100 bash yamls/clusters/run.sh YAML [key=value ...]
# Run it on every node. Environment variables, with defaults:
#   NNODES          number of nodes (1)
#   NODE_RANK       this node's number, from 0 (0)
#   MASTER_ADDR     name or address at which the others reach node 0 (127.0.0.1 for one node)
#   MASTER_PORT     a free port of node 0 (29500; for one node, any free one)
#   NPROC_PER_NODE  processes per node, the same on all (the number of GPUs; 1 without a GPU)
# Exit code: 0 when trained; 143 when saved after a SIGTERM, and the same command resumes; 2 for an invalid command,
# config or data.
set -euo pipefail

refuse() {
    echo "error: $1" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ $# -ge 1 ] || refuse "no YAML: bash yamls/clusters/run.sh YAML [key=value ...]"
[ -f "$1" ] || refuse "$1: no such file; the first argument is the run's YAML"
command -v python >/dev/null || refuse "no python on the PATH; activate the environment: source .venv/bin/activate"

for name in NNODES NODE_RANK NPROC_PER_NODE MASTER_PORT; do
    value=${!name:-}
    [[ $value =~ ^(0|[1-9][0-9]{0,5})?$ ]] || refuse "$name: got $value, expected a whole number"
done
nodes=${NNODES:-1} rank=${NODE_RANK:-0} processes=${NPROC_PER_NODE:-}
[ "$nodes" -ge 1 ] || refuse "NNODES: got 0, expected at least 1"
[ "$rank" -lt "$nodes" ] || refuse "NODE_RANK: got $rank, expected 0 to $((nodes - 1)) (NNODES=$nodes)"
[ "$processes" != 0 ] || refuse "NPROC_PER_NODE: got 0, expected at least 1"
port=() address=${MASTER_ADDR:-127.0.0.1}
if [ "$nodes" -gt 1 ]; then
    [ -n "${NODE_RANK:-}" ] || refuse "NODE_RANK: not set, expected each node's own number, from 0 (NNODES=$nodes)"
    [ -n "${MASTER_ADDR:-}" ] || refuse "MASTER_ADDR: not set, expected node 0's name or address (NNODES=$nodes)"
    port=(--master_port "${MASTER_PORT:-29500}")
elif [ -n "${MASTER_PORT:-}" ]; then
    port=(--master_port "$MASTER_PORT")
fi
[ -n "$processes" ] || processes=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')

# As flags, which override variables that a scheduler may have set.
exec python "$root/sit_composer/launch.py" -n "$processes" --world_size $((nodes * processes)) \
    --node_rank "$rank" --base_rank $((rank * processes)) --master_addr "$address" ${port[@]+"${port[@]}"} \
    "$root/sit_composer/train.py" "$@"
