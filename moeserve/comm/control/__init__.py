"""What ranks send each other beside tokens.

::

    handshake                      all ranks must serve the same before a step is run
    step_mesh                      what ranks agree on at each step: rounds, wake-ups, alarms
    mesh  neighbours               over sockets between ranks 2^i apart, by a native thread
    mesh_twin                      the native half of it in Python
    mesh_protocol  mesh_messages   what a rank does with a message; kinds and bounds
    silence                        who has been silent for too long
    local_mesh                     between threads of one process: the slow twin
    subscribers                    who hears of an alarm
    idle_connections               connections of gRPC that nobody uses give way to others
    on_loop                        from another thread, something done on the event loop's
    rpc                            gRPC between processes of one instance, and whom they trust
"""
