"""Moving tokens between ranks.

Who they are (``launch``, ``group``), how bytes travel (``exchange`` and its backends), which copies
of a token go where (``layout``, ``assign``), a step over all of it (``dispatcher``, ``pipeline``).
"""
