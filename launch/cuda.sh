#!/bin/sh
# Sets what ranks on NVIDIA GPUs need, then runs the rest of the line:
#
#   RANKS=8 launch/cuda.sh launch/torchrun.sh --model deepseek --device cuda
#
#   DRIVER  where the driver says its version [/proc/driver/nvidia/version]
#
# Whatever is set already is kept. Between hosts NCCL_SOCKET_IFNAME may have to name the interface
# that the others reach, and NCCL_DEBUG=INFO says what NCCL takes.
set -eu
driver="${DRIVER:-/proc/driver/nvidia/version}"
if [ ! -r "$driver" ]; then
    echo "cuda.sh: there is no $driver: install NVIDIA's driver, or give --device cpu without this script" >&2
    exit 1
fi
# A rank that is lost is named by the others, which then end in order: not by a thread of torch that
# ends the process, nor by one that finds a first step long in which kernels are compiled.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-0}"
export TORCH_NCCL_ENABLE_MONITORING="${TORCH_NCCL_ENABLE_MONITORING:-0}"
# Segments are shared with other processes by handles (--ep-backend mapped), which memory that grows
# in place has only under newer drivers.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:False}"
exec "$@"
