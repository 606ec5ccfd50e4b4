# shellcheck shell=bash
# What torchrun's processes have in common; read by the scripts beside it. Your own values win.

# How long torchrun waits for its processes to save after SIGTERM, seconds. Versions of torch that
# do not know it wait 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

# torchrun gives each process one thread unless told otherwise; clustering neurons uses more.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    count="${PROCESSES:-$( (nvidia-smi --list-gpus 2>/dev/null || echo one) | wc -l)}"
    OMP_NUM_THREADS=$(($(nproc) / count))
    export OMP_NUM_THREADS=$((OMP_NUM_THREADS > 0 ? OMP_NUM_THREADS : 1))
fi

# NCCL finds its way by itself on most machines. Where it does not:
#   NCCL_DEBUG=INFO            says which network and which GPUs' links it uses
#   NCCL_SOCKET_IFNAME=eth0    the interface to meet on, where there are several; =^docker0,lo: not those
#   NCCL_IB_HCA=mlx5           the InfiniBand or RoCE adapters to use
#   NCCL_IB_DISABLE=1          TCP only, to tell a broken fabric from a broken run
#   NCCL_P2P_DISABLE=1         no direct access between GPUs, to tell a broken link likewise
#   GLOO_SOCKET_IFNAME=eth0    the same interface, for processes on CPUs
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
