"""Where things lie in the memory that a grammar worker shares with its child.

::

    bytes 0 .. 7    the key whose turn it is, NOBODY between turns
    from FIRST_ROW  rows of masks; bit i of byte b is token 8 b + i, set where it may come
"""

FIRST_ROW = 64
NOBODY = -1
