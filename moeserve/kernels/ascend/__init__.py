"""The op table on Ascend NPUs, composed of torch_npu's fused operators; tested by emulation.

::

    ops                        the op table
    limits                     what the operators take, by their documentation; what falls back
    calls                      each operator behind one typed function: nothing else names them
    matrices                   weights as the operators want them, and products over them
    kv                         the paged cache in device memory, attention over it
    grid                       units and exact sums of contributions, elementwise
    dispatch  wire             dispatch and combine over records, in host memory or on the device
    buffers                    what HCCL's buffer must hold, and the environment of ranks
    records                    packed weights over memory: refused
    schemas                    the operators' signatures (schemas.txt), as the wheel has them
    twin                       each operator in plain torch by its documentation, for machines
                               without an NPU; twin_distribute: those between ranks, which are
                               threads; twin_options: the arguments that a twin takes
"""
