"""The gRPC door.

::

    door         a server: bind, open, announce, close
    inference    ``moeserve.v1.Inference``: messages to client requests, deltas to chunks
    statuses     the frame around every method: our errors as statuses with details
    guards       around every method of every service: who calls, how its message is read
    reads        how long a message may take to arrive, and how many are on their way at once
    connections  connections that nobody uses give way to others
"""
