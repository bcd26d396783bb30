"""Who holds which expert: from recorded routing to a plan with a proven gap. No torch.

::

    cluster  routing  plan     plain data: devices and links; what was routed; slots -> experts
    topology                   a real cluster as a file
    files                      bounds on what files of others hold, and reading within them
    problem                    what is asked of a solver, and what can be refused at once
    split                      which copy of a replicated expert a token uses: the runtime's rule
    layer_use  migration       where the tokens of a layer go; where a migrating token is after it
    cost                       balance and copies of a plan in each dataflow
    step_time  judged          balance and copies as one figure, by rates; figures with that step
    report                     the figures of a plan with its bound and gap
    plot  page                 the report of a plan: put together; as one HTML page
    pictures  heat_map         what there is to see; heat maps as HTML
    fitted  baselines          what a plan was fitted on; contiguous and EPLB beside it
    cli  cluster_arguments     ``moeserve place``: the arguments; those of the cluster
    commands  tables           its verbs; what they print
    aside                      a plan solved in a process of low priority, beside one that serves
    library                    the five functions below
    formats/                   files of others, in and out
    solvers/                   how plans are found

Letters at the end of names are shapes, everywhere in this package: T tokens, L layers, K experts
chosen per token, E experts, S slots per layer, D devices, N nodes, W workloads, C sequences.
Slot ``s`` belongs to device ``s // (S / D)``, device ``d`` to node ``d // (D / N)``.

From Python, five functions and what they take; ``docs/planner_library.md`` shows them at work. They
are imported when they are first used: the command line starts without numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeserve.placement.cluster import Cluster
    from moeserve.placement.library import compare, evaluate, export, load_routing, solve
    from moeserve.placement.plan import Plan
    from moeserve.placement.routing import Routing
    from moeserve.placement.solvers.portfolio import Budget

__all__ = [
    "Budget",
    "Cluster",
    "Plan",
    "Routing",
    "compare",
    "evaluate",
    "export",
    "load_routing",
    "solve",
]


def __getattr__(name: str) -> Any:
    """What ``__all__`` names, from where it is."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moeserve.placement import cluster, library, plan, routing
    from moeserve.placement.solvers import portfolio

    where = {"Cluster": cluster, "Plan": plan, "Routing": routing, "Budget": portfolio}
    return getattr(where.get(name, library), name)
