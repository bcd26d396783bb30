"""The backend in Triton: CUDA devices, and any CPU in Triton's interpreter. Needs the extra
``cuda``.

::

    ops                        the op table
    packing  tiles             weights on the device; which tile a product takes
    products  route  experts   products and other operations on rows; routing; the experts
    attention  host_attention  the paged cache, and attention over it; or both left to the host
    sampling                   tokens from logits
    sums  wire                 contributions become rows; dispatch and combine
    launch  graphs             the one way to a kernel; decode steps captured and replayed
    aot  variants              kernels compiled for a device elsewhere: how, and which
    instructions  predict      what code asks of a multiprocessor; how long kernels would take
    double                     a device in name, for tests
    device/                    the kernels
"""
