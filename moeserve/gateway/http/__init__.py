"""The HTTP door.

::

    app         OpenAI's routes and small ones around them
    body        a request's body, read within its bounds, as JSON
    agents      OpenAI's Responses and Anthropic's Messages
    generation  one generation, whole or as server-sent events
    typed_generation  the same, where events have types
    failures    the frame around every route: failures in OpenAI's form
    guards      who may call
    access      a line in the log for calls that the service does not tell of
    server      a listening socket and the connections that come in by it
    acceptor    takes connections, as many as there may be
    phases      what each connection waits for, since when, and who has to go
    protocol    one connection: uvicorn's, which tells its phase
    log_rate    a bound on what strangers can make us log
    request_ids x-request-id, which comes back
"""
