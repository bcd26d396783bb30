"""The doors through which clients come in, and what stands behind them.

::

    http          the HTTP door: routes, bodies, server-sent events, who may call
    openai        OpenAI's JSON, without a transport: bodies in, answers out
    anthropic     Anthropic's Messages, without a transport
    parsers       a model's text to content, reasoning and tool calls
    grpc          the gRPC door: ``moeserve.v1.Inference`` with health and reflection
    trust         who a request is from, and TLS of both doors
    descriptors   how many connections doors may hold, from how many files may be open
    limits        every bound on a request; client fields to sampling parameters
    grammars      whether a grammar can be used, before its request is queued
    service       what a request means, whatever door it came through
    stream        the running sequences of one request, for whoever reads them
    records       what is told of a request when it has ended
    text_work     client texts: bodies parsed, conversations rendered, texts tokenised
    json_body     a request body as JSON
    text          from token ids to text that is ready to show, and stop strings
    mailbox       events from engines' threads to the event loop, each to its stream
    dashboard     the page that shows who serves, what moves, and how well
    entrance      both doors as the settings want them, and what they watch
    door_metrics  what the doors count: connections, and what each tenant has used
    server        one process that serves: bind, load, serve, drain
    routed        a model that other processes run
    offline       one answer without a server
    batch         many requests from a file, without a server
"""
