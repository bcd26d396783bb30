"""The op table and its backends.

::

    ops                        the contract: every tensor operation a decoder may use
    select  device             the op table of a device; which devices are here, and which is taken
    probe                      how fast the machine can go at most
    fused                      the fused operations spelled out: their meaning, and natives' oracle
    guesses                    chains of guesses of a multi-token prediction module
    matrix                     weights in 8 and 4 bits, between loader and op table
    records                    packed weights as bytes at fixed places
    wire                       what ranks send each other for a mixture: records and sums
    sampling  host_copy        what a row to be sampled needs; where tensors leave the device
    kv_layout  kv_runs         KV blocks as bytes, once they have left a cache; runs with digests
    shared_memory              memory that several processes of one host have
    host_kv                    KV of an accelerator's table in the host's memory
    thread_meeting             where threads that play ranks meet, for twins of libraries
    reference/                 the backend in plain torch
    cpu/                       the native backend
    ascend/                    the backend of Ascend NPUs
    triton/                    the backend of CUDA devices, in Triton
"""
