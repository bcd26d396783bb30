"""The op table by native kernels (``kernels/cpu/`` at the root): shapes are checked here.

ops       the table itself: one native call for each operation
packing   weights into the panels that the kernels read
handles   a decoder's parts, packed once for the calls of every step
kv        the paged cache, attention over it, blocks as bytes
wire      dispatch and combine, on the bytes where they lie
"""
