"""The gRPC door.

::

    door       a server: bind, open, announce, close
    inference  ``moeserve.v1.Inference``: messages to client requests, deltas to chunks
    statuses   the frame around every method: our errors as statuses with details
    guards     who may call
"""
