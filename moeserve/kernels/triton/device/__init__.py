"""What runs on the device: Triton kernels, and functions of them. Nothing here is called but by
``launch``; wrappers beside this folder check shapes and choose tiles.

A kernel's parameters are what a launch takes: pointers, numbers, then tile sizes in capitals, which
are powers of two. A row's result never depends on how many rows there are, nor on the order in
which programs run: each writes what no other does.

::

    lang                       arithmetic whose bits are the same everywhere
    rows                       rows by themselves: norm, quantisation, GLU, RoPE, units, the best
    products                   tiles of a product by weights of every kind
    experts                    who goes to which expert, and the two products of experts
    route                      from logits to experts and weights
    sample                     from logits to tokens
    pages                      the paged cache written, and attention over it
    sums                       contributions become rows
"""
