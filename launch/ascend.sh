#!/bin/sh
# Sets what ranks on Ascend NPUs need, then runs the rest of the line:
#
#   RANKS=8 launch/ascend.sh launch/torchrun.sh --model deepseek --device npu --block-size 128
#
#   CANN  folder of the toolkit [/usr/local/Ascend/ascend-toolkit]
#
# Whatever is set already is kept. With --dispatcher moe_distribute HCCL_BUFFSIZE may have to be set,
# too: a start that needs more says how much.
set -eu
cann="${CANN:-/usr/local/Ascend/ascend-toolkit}"
if [ ! -r "$cann/set_env.sh" ]; then
    echo "ascend.sh: there is no $cann/set_env.sh: install CANN, or name its folder in CANN" >&2
    exit 1
fi
# CANN's own scripts use variables that may be unset.
set +u
# shellcheck disable=SC1091 # CANN's
. "$cann/set_env.sh"
set -u
# torch would load torch_npu itself, in every process: moeserve does where it is wanted.
export TORCH_DEVICE_BACKEND_AUTOLOAD="${TORCH_DEVICE_BACKEND_AUTOLOAD:-0}"
export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"
export HCCL_OP_EXPANSION_MODE="${HCCL_OP_EXPANSION_MODE:-AIV}"
export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-1}"
exec "$@"
