"""Dispatch and combine by libraries that do both themselves: each a ``Dispatcher``, used only where
it is asked for, is installed, and can do it.

::

    promise                  what is sent, and what law 1 still holds of it
    choices                  which slot each choice goes to; rows of single choices
    moe_distribute           npu_moe_distribute_dispatch_v2 and ..._combine_v2 of torch_npu
    deepep                   DeepEP's kernels: normal, and of low latency
    deepep_exchange          DeepEP's dispatch as a carrier of our own records
    deepep_twin              deep_ep.Buffer in plain torch, for machines without GPUs
    process_group            the groups of NCCL and HCCL that libraries want
    open                     what a set-up lacks; the dispatcher of one that lacks nothing
"""
