"""KV between caches: what a cache offers, how its bytes travel, and whether they arrived whole.

::

    house          the KV of one rank, as those see it who bring some or take some away
    runs           the KV of consecutive positions of a layer, as bytes
    digests        what a run is known by: its place, its tokens, its bytes
    order          which runs of a sequence are still to come
    exporter       blocks into runs
    importer       runs into blocks, checked
    frames         messages as bytes: a head, and KV behind it
    messages       what the two sides read of one another
    mover          the thread on which bytes are moved
    outlet         how the bytes of a frame leave a source
    memory         the same by memory that two processes of a host share
    mooncake       the same by Mooncake's transfer engine, between hosts that have it
    flow           many frames through that memory, without a message for each
    supply         whose KV a source has: a request that it prefills, or that it runs
    source_call    one call, from the side of the source
    source_messages  what a source says of the KV that it sends
    serve          all calls, as the source's server has them
    receiver_call  one call, from the side that fetches
    fetch          calls to sources, one after the other
    channels       connections to other members
    arrival        one request whose KV is elsewhere, until the engine has it
    arrivals       all of them, between a rank's server and its engine
    limits         how long everything may take, and how much may be under way
    counters       what is counted
"""
