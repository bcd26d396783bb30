#!/bin/sh
# moeserve over RANKS ranks, started by mpirun of Open MPI or MPICH; arguments go to the worker.
#
#   one host       RANKS=4 launch/mpirun.sh --model demo --http-port 8000
#   several hosts  RANKS=8 HOSTS=host0:4,host1:4 MASTER_ADDR=host0 launch/mpirun.sh --model ...
#                  with one MOESERVE_EP_SECRET; mpirun reaches the hosts by ssh, and moeserve must
#                  be installed at the same place on each; clients talk to rank 0, on the first host
#
#   RANKS        ranks in all [2]
#   HOSTS        host:ranks,... in the order of ranks; [this host]
#   MASTER_ADDR  address of rank 0's host as the others reach it [as the worker finds it]
#   MASTER_PORT  a free port there [as the worker finds it]
#   MPIRUN       which one [mpirun]
#   PYTHON       the interpreter moeserve is installed for [python3]
#
# Ranks share cores here, so none is bound to one. As root, Open MPI wants OMPI_ALLOW_RUN_AS_ROOT=1
# and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1. A rank that ends badly ends the others.
set -eu
mpirun=${MPIRUN:-mpirun}
if "$mpirun" --version 2>&1 | grep -q 'Open MPI'; then
    set -- --bind-to none --map-by :OVERSUBSCRIBE ${HOSTS:+--host "$HOSTS"} \
        ${MASTER_ADDR:+-x MASTER_ADDR} ${MASTER_PORT:+-x MASTER_PORT} \
        ${MOESERVE_EP_SECRET:+-x MOESERVE_EP_SECRET} \
        "${PYTHON:-python3}" -m moeserve.worker "$@"
else
    # MPICH's hydra hands the whole environment on by itself.
    set -- -bind-to none ${HOSTS:+-hosts "$HOSTS"} "${PYTHON:-python3}" -m moeserve.worker "$@"
fi
exec "$mpirun" -n "${RANKS:-2}" "$@"
