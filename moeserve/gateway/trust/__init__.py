"""Whom the doors trust, and how they prove who they are.

::

    identity      who a request is from: keys with names, and the tenant that each is
    certificates  TLS of both doors, from files that may change
    authority     a certificate authority for tests
    file_watch    files that are read again when they change
"""
