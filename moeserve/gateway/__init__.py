"""The doors through which clients come in, and what stands behind them.

::

    http     the HTTP door: routes, bodies, server-sent events, who may call
    openai   OpenAI's JSON, without a transport: bodies in, answers out
    anthropic  Anthropic's Messages, without a transport
    parsers  a model's text to content, reasoning and tool calls
    grpc     the gRPC door: ``moeserve.v1.Inference`` with health and reflection
    limits   every bound on a request; client fields to sampling parameters
    service  what a request means, whatever door it came through
    stream   the running sequences of one request, for whoever reads them
    text     from token ids to text that is ready to show, and stop strings
    mailbox  events from engines' threads to the event loop, each to its stream
    server   one process that serves: bind, load, serve, drain
    offline  one answer without a server
"""
