"""Where things lie in the memory that a grammar worker shares with its child.

::

    bytes 0 .. 7        the key whose turn it is, NOBODY between turns
    from FIRST_TOKEN    of up to MOST_TOKENS rows the token that came since the last question, as
                        32-bit integers: written by the parent before it asks for "next"
    from FIRST_ROW      rows of masks; bit i of byte b is token 8 b + i, set where it may come
"""

FIRST_TOKEN = 64
FIRST_ROW = 4096
MOST_TOKENS = (FIRST_ROW - FIRST_TOKEN) // 4
NOBODY = -1
