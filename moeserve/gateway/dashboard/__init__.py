"""The page at ``/dashboard``: who serves, what moves between them, and how well, live.

::

    snapshot    what is shown at one moment, and who can tell it
    history     what is kept for it: tokens of the last minutes, answers that came in time
    cluster     the members of a cluster, as what is shown
    own         this process, and the ranks behind it, as what is shown
    feed        one snapshot a second, for however many watch
    live        the dashboard of a process: what it keeps, and the snapshots made of it
    routes      its routes: the page, and the snapshots as server-sent events

The page is ``page.html``, ``page.css`` and ``page.js``, which draws; it loads nothing else.
"""
