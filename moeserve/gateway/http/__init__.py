"""The HTTP door.

::

    app         OpenAI's routes and small ones around them
    body        a request's body, read within its bounds, as JSON
    generation  one generation, whole or as server-sent events
    failures    the frame around every route: failures in OpenAI's form
    guards      who may call
    request_ids x-request-id, which comes back
    server      a listening socket and the uvicorn on it
"""
