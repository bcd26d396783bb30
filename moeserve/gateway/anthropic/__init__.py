"""Anthropic's Messages, without a transport: request bodies in; answers and events out.

::

    messages  bodies of ``/v1/messages``, put as those of chat
    answers   answers: content blocks, and the events that tell of them
    errors    failures in Anthropic's form
"""
