#!/bin/sh
# moeserve over RANKS ranks per host, started by torchrun; every argument goes to the worker.
#
#   one host       RANKS=4 launch/torchrun.sh --model demo --http-port 8000
#   several hosts  the same line on each, with NNODES=2 NODE_RANK=0 (1, ...) MASTER_ADDR=host0 and
#                  one MOESERVE_EP_SECRET for all; clients talk to rank 0, which is on NODE_RANK 0
#
#   RANKS        ranks on this host [2]
#   NNODES       hosts [1]
#   NODE_RANK    number of this host, from 0 [0]
#   MASTER_ADDR  address of host 0 as the others reach it [127.0.0.1]
#   MASTER_PORT  a free port there [29500]; with one host any free port is taken
#   PYTHON       the interpreter moeserve is installed for [python3]
#
# A rank that ends badly ends the others; nothing is restarted.
set -eu
if [ "${NNODES:-1}" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then
    meet="--standalone"
else
    meet="--node-rank ${NODE_RANK:-0} --master-addr ${MASTER_ADDR:-127.0.0.1}
          --master-port ${MASTER_PORT:-29500}"
fi
# shellcheck disable=SC2086 # several words on purpose
exec "${PYTHON:-python3}" -m torch.distributed.run --nnodes "${NNODES:-1}" \
    --nproc-per-node "${RANKS:-2}" --max-restarts 0 $meet -m moeserve.worker "$@"
