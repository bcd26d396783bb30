#!/bin/sh
# moeserve over the slots of a hostfile, started by DeepSpeed's launcher; arguments go to the worker.
#
#   one host       RANKS=4 launch/deepspeed.sh --model demo --http-port 8000
#   several hosts  HOSTFILE=launch/hostfile MASTER_ADDR=host0 launch/deepspeed.sh --model ...
#                  with one MOESERVE_EP_SECRET in ~/.deepspeed_env; the launcher reaches the hosts
#                  by pdsh over ssh; clients talk to rank 0, on the first host
#
#   RANKS        ranks on one host, where there is no HOSTFILE [2]
#   HOSTFILE     lines "HOST slots=RANKS", in the order of ranks (launch/hostfile is one)
#   MASTER_ADDR  address of the first host as the others reach it [127.0.0.1, or as it finds it]
#   MASTER_PORT  a free port there [29500]
#   DEEPSPEED    the launcher [deepspeed]
#
# moeserve takes nothing but the ranks from DeepSpeed. A rank that ends badly ends the others.
set -eu
deepspeed=${DEEPSPEED:-deepspeed}
port="--master_port ${MASTER_PORT:-29500}"
if [ -n "${HOSTFILE:-}" ]; then
    where="--hostfile $HOSTFILE ${MASTER_ADDR:+--master_addr $MASTER_ADDR}"
else
    # A hostfile that is not there: this host alone, not what /job/hostfile says.
    where="--hostfile /dev/null/none --num_gpus ${RANKS:-2}
           --master_addr ${MASTER_ADDR:-127.0.0.1}"
fi
# On CPUs every slot is a process; the launcher would otherwise count accelerators.
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
# shellcheck disable=SC2086 # several words on purpose
"$deepspeed" $where $port --no_local_rank --module moeserve.worker "$@" &
runner=$!
# TERM ends the launcher alone and leaves its ranks: they are ended through its child, on several
# hosts by the INT that it listens to.
if [ -n "${HOSTFILE:-}" ]; then
    trap 'kill -INT "$runner" 2>/dev/null || true' TERM INT
else
    trap 'pkill -TERM -P "$runner" 2>/dev/null || true' TERM INT
fi
status=0
wait "$runner" || status=$?
while kill -0 "$runner" 2>/dev/null; do
    status=0
    wait "$runner" || status=$?
done
exit "$status"
