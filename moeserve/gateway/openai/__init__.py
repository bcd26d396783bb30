"""OpenAI's JSON, without a transport: request bodies in; answers, whole and in chunks, out.

::

    fields              fields that several routes share, and the rule for all others
    completions         bodies of ``/v1/completions``
    chat                bodies of ``/v1/chat/completions``
    structured          the form that an answer must have, as a grammar
    messages            a conversation, from clients' shape to chat templates'
    tools               tools, and which of them may or must be called
    reading             how the text of a request's answers is read
    prepare             a conversation to a prompt, and all that follows from the model
    responses           bodies of ``/v1/responses``, put as those of chat
    response_answers    answers of ``/v1/responses``: items, and their events
    tokens              bodies of ``/tokenize`` and ``/detokenize``
    answers             what all answers have alike: head, choices, usage
    completion_answers  answers of ``/v1/completions``
    chat_answers        answers of ``/v1/chat/completions``
    logprobs            log-probabilities in both of OpenAI's forms
    rendering           answers as JSON text, in pieces
    errors              failures in OpenAI's form
"""
