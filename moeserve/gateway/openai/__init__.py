"""OpenAI's JSON, without a transport: request bodies in; answers, whole and in chunks, out.

::

    fields              fields that several routes share, and the rule for all others
    completions         bodies of ``/v1/completions``
    chat                bodies of ``/v1/chat/completions``
    tokens              bodies of ``/tokenize`` and ``/detokenize``
    answers             what all answers have alike: head, choices, usage
    completion_answers  answers of ``/v1/completions``
    chat_answers        answers of ``/v1/chat/completions``
    logprobs            log-probabilities in both of OpenAI's forms
    rendering           answers as JSON text, in pieces
    errors              failures in OpenAI's form
"""
