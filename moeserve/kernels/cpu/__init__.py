"""The op table by native kernels (``kernels/cpu/`` at the root): shapes are checked here.

::

    ops                        the op table: pointers go to ``_cpu``
    handles                    handles of a decoder's parts, made once and passed with every step
    forward                    a forward pass whose arguments are made once
    guesser                    chains of guesses, one native call each
    packing  memory            weights in the layout of the kernels, made once; huge pages
    records                    packed weights over any memory that has their bytes
    kv                         the paged cache
    wire                       dispatch and combine, one native call each
"""
