"""The op table and its backends.

``ops`` is the contract, ``reference`` plain torch, ``cpu`` native; ``select`` chooses one.
"""
