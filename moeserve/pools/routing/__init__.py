"""Which members a request goes to: pure policies over what members report of their load.

* ``base``: what a request wants of a route, what a route is, and what a policy does
* ``loads``: the members that may be chosen, with their loads and what was sent to them since
* ``predict``: how long a member would take for a request
* ``choosing``: the best of a pool of members, of all or of a few
* ``least_finish``: the route with the least predicted finish, one member or two
* ``locality_free``: that, wherever KV lies: the default
* ``kv_local``: that, drawn to members that were sent the same prefix
* ``freeness``: the most decode steps until memory is full, with virtual usage (Llumnix)
* ``crowding``: which members should give running requests away, and to whom
* ``role_shift``: what a unified member leans to, as the load of the pools shifts
* ``leaning``: that, for the reports of a member
* ``named``: policies by name
* ``router``: requests to routes, for a gateway
"""
