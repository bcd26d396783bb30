"""Many requests from a file, answered into a file: OpenAI's batch format, without a server.

::

    lines      the input: a line at a time within bounds, and what it asks
    answers    the output: whole lines, appended as answers come, found again after any end
    outputs    where answers go, and what of the input is answered already
    inside     one request of the HTTP door's application, without a socket
    run        all lines of a batch, as many at once as the engine has use for
    session    model, service and application for the length of a batch
    progress   how far it is: a bar on a terminal, lines elsewhere
    command    `moeserve batch`

Requests go through the application of the HTTP door and its service, so bodies mean what they mean
there.
"""
