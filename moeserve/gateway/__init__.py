"""The doors through which clients come in, and what stands behind them.

::

    grpc_door                  ``moeserve.v1.Inference`` with health and reflection
    http_door                  OpenAI's routes: who may call, status codes, server-sent events
    http_bodies  http_answers  OpenAI's JSON: request bodies in; answers, whole and in chunks, out
    http_server                a listening socket and the uvicorn on it
    limits                     every bound on a request; client fields to sampling parameters
    service                    what a request means, whatever door it came through
    stream                     the running sequences of one request, for whoever reads them
    text_work  json_body       bodies parsed, conversations rendered, texts tokenised
    text                       from token ids to text that is ready to show, and stop strings
    mailbox                    events from engines' threads to the event loop, each to its stream
    server                     one process that serves: bind, load, serve, drain
    offline                    one answer without a server
"""
