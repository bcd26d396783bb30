"""The gRPC door.

::

    door           a server: bind, open, announce, close
    inference      ``moeserve.v1.Inference``: messages to client requests, deltas to chunks
    kserve         ``inference.GRPCInferenceService``, as KServe and Triton speak it
    infer_request  what an inference of that wants, as the service takes it
    tensors        its tensors, in messages and as values
    statuses       the frame around every method: our errors as statuses with details
    guards         who may call
    reads          how long a message may take to arrive, and how many are on their way at once
"""
