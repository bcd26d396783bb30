"""How a checkpoint stores its matrices: read into ``kernels.matrix``, or refused by name.

``method`` reads what config.json claims, ``layouts`` turns tensors into matrices, ``grouped`` is
what the 4-bit layouts share. A config can only name a method; which modules are quantised, and in
how many bits, is read from the tensors themselves, so that exceptions need no list.
"""
