"""``moeserve bench serve``: load on a server of OpenAI's HTTP API or of ``moeserve.v1`` over gRPC.

What decides and counts is pure (times are arguments); clients and the command stand beside it::

    plan        requests of a run: when each is due, what it asks for
    arrivals    when requests of a given rate are due
    traces      requests read from traces of others, and from our own format
    prompts     token ids or words of a prompt
    outcomes    what became of a request: times, tokens, failure
    slos        limits on latencies, and which requests keep them
    statistics  percentiles, rates, requests outstanding
    report      all that is said of a run, as JSON and as a table
    figures     the same as a picture
    saving      outcomes as JSON lines

    run         sends each request when it is due
    targets     what a server must be able to do to be driven; its address and certificates
    sse         server-sent events out of bytes
    openai      requests and answers of OpenAI's API
    http        connections of HTTP, and the target that uses them
    grpc        the target that calls ``moeserve.v1``
    measure     one run: its target opened, warmed up, driven, its progress shown
    command     arguments, and the report of a run
"""
