#!/usr/bin/env bash
# Train on several machines: run this on each of NODES, with the same arguments, those of
# `ambidex train`.
#
#   HEAD=node0 NODES=2 node.sh --preset gpt-124m --device cuda --set parallel=fsdp \
#       --data TOKENS --out RUN
#
# HEAD       one of the machines, where they meet, by a name that all of them know
# NODES      how many machines
# PORT       a port of HEAD that the others reach (default 29500)
# RUN_ID     tells runs apart that meet at the same place (default ambidex)
# PROCESSES  how many to start on this machine (default: one a GPU)
#
# TOKENS and RUN are on a file system that all machines see. SIGTERM to all of them finishes the
# running step and saves it; the same commands go on from there.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
: "${HEAD:?is the machine where all meet}" "${NODES:?is the number of machines}"

exec torchrun --nnodes "$NODES" --nproc-per-node "${PROCESSES:-gpu}" \
    --rdzv-backend c10d --rdzv-id "${RUN_ID:-ambidex}" --rdzv-endpoint "$HEAD:${PORT:-29500}" \
    -m ambidex train "$@"
