#!/usr/bin/env bash
# Train on all GPUs of this machine: one-node.sh --preset gpt-124m --device cuda --data TOKENS --out RUN
#
# The arguments are those of `ambidex train`. PROCESSES says how many to start (default: one a GPU).
# SIGTERM or Ctrl-C finishes the running step and saves it; the same command goes on from there.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" -m ambidex train "$@"
