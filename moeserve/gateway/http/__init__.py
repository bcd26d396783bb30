"""The HTTP door.

::

    app         OpenAI's routes and small ones around them
    body        a request's body, read within its bounds, as JSON
    agents      OpenAI's Responses and Anthropic's Messages
    generation  one generation, whole or as server-sent events
    typed_generation  the same, where events have types
    failures    the frame around every route: failures in OpenAI's form
    guards      who may call
    server      a listening socket and the uvicorn on it
"""
