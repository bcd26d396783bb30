"""Requests over several ranks: each has an engine of its own, and all run the same steps.

::

    lock_step.py      a rank's executor and pace: its part of every step, together with all others
    records.py        what every rank says once per step, and what all conclude from it
                      (load_report: what its scheduler puts in; loads: the table of all, and who
                      gives waiting requests back)
    microbatches.py   how many microbatches a step is cut into
    instance.py       all ranks as one engine, as a door sees them
    front.py          a door's requests, until they have a home and while they are there
                      (rank_view: what the door believes of the ranks; prefixes: which rank probably
                      has the KV of a prompt's beginning)
    homes.py          which rank with room becomes a request's home (expert_use: counts whose
                      experts prompts use)
    rank_links.py     the ranks as a door reaches them: by calls, or over gRPC (outgoing: what waits
                      to be told to a rank)
    rank_server.py    a rank as other processes reach it (door_requests: one door's, and the news of
                      them; messages: requests and events as protobuf)
    plan_peers.py     how rank 0 reaches all ranks about a change of plan
    counted.py        what all ranks have counted, gathered for whoever shows it
    meeting.py        where the server of each rank is, and how to connect to it
    build.py          from a model folder to a rank's part of a run
    fleet.py          all ranks' schedulers behind one queue that knows everything at once: the
                      exact policy that ``front`` is measured against; serves nobody
"""
