"""The routes that agents use beside chat: OpenAI's Responses and Anthropic's Messages.

Each body is put as one of chat, and rendered and read as such; only the answers are written
otherwise. Failures of Messages go out in Anthropic's form.
"""

from __future__ import annotations

import functools
import time

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moeserve.errors import InvalidRequestError, MoeserveError
from moeserve.gateway.anthropic.answers import MessageWriter
from moeserve.gateway.anthropic.errors import anthropic_error, anthropic_failure
from moeserve.gateway.anthropic.messages import chat_of_message
from moeserve.gateway.http.body import read_body
from moeserve.gateway.http.failures import Endpoint, failed_response
from moeserve.gateway.http.typed_generation import TypedGeneration
from moeserve.gateway.openai.answers import AnswerHead
from moeserve.gateway.openai.chat import parse_chat
from moeserve.gateway.openai.fields import refuse
from moeserve.gateway.openai.prepare import named, prepare, render
from moeserve.gateway.openai.response_answers import ResponseWriter
from moeserve.gateway.openai.responses import chat_of_response
from moeserve.gateway.service import InferenceService
from moeserve.gateway.stream import ResponseStream


class AgentRoutes:
    """Answers for one service."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    @property
    def table(self) -> list[tuple[str, str, Endpoint]]:
        return [
            ("POST", "/v1/responses", self.responses),
            ("POST", "/v1/messages", in_anthropic_form(self.messages)),
            ("POST", "/v1/messages/count_tokens", in_anthropic_form(self.count_tokens)),
        ]

    async def responses(self, request: Request) -> Response:
        chat, asked = chat_of_response(await read_body(request, self._service.texts))
        try:
            wanted, form, conversation = parse_chat(chat)
            _one(wanted.n)
            wanted, reading = await prepare(self._service, named(wanted, "resp"), conversation)
        except InvalidRequestError as error:
            raise _renamed(error, _RESPONSE_NAMES) from error

        def write(stream: ResponseStream) -> ResponseWriter:
            return ResponseWriter(self._head(stream), asked, reading)

        return TypedGeneration(self._service, wanted, form, write, failed_response)

    async def messages(self, request: Request) -> Response:
        chat, asked = chat_of_message(await read_body(request, self._service.texts))
        wanted, form, conversation = parse_chat(chat)
        _one(wanted.n)
        wanted, reading = await prepare(self._service, named(wanted, "msg"), conversation)

        def write(stream: ResponseStream) -> MessageWriter:
            return MessageWriter(self._head(stream), asked, reading, stream.prompt_tokens)

        return TypedGeneration(self._service, wanted, form, write, anthropic_response)

    async def count_tokens(self, request: Request) -> Response:
        chat, _ = chat_of_message(await read_body(request, self._service.texts), counting=True)
        wanted, _, conversation = parse_chat(chat)
        served = self._service.model(wanted.model)
        text = await render(self._service.texts, served, conversation)
        ids = await self._service.tokenize(wanted.model, text, wanted.special_tokens)
        return JSONResponse({"input_tokens": len(ids)})

    def _head(self, stream: ResponseStream) -> AnswerHead:
        return AnswerHead(stream.request_id, self._service.served.name, int(time.time()), 1)


# What chat calls otherwise.
_RESPONSE_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}


def _renamed(error: InvalidRequestError, names: dict[str, str]) -> InvalidRequestError:
    param = names.get((error.param or "").partition(".")[0])
    return error if param is None else InvalidRequestError(error.message, param=param)


def _one(n: object) -> None:
    if n != 1:
        refuse("n", "this route gives one answer; leave it out")


def anthropic_response(error: MoeserveError) -> Response:
    headers = dict(failed_response(error).headers)
    kept = {name: headers[name] for name in ("retry-after",) if name in headers}
    return JSONResponse(anthropic_failure(error), error.http_status, kept)


def in_anthropic_form(endpoint: Endpoint) -> Endpoint:
    """The endpoint with failures before its answer in Anthropic's form."""

    @functools.wraps(endpoint)
    async def inner(request: Request) -> Response:
        try:
            return await endpoint(request)
        except MoeserveError as error:
            return anthropic_response(error)
        except HTTPException as error:
            return JSONResponse(
                anthropic_error(str(error.detail), error.status_code), error.status_code
            )

    return inner
