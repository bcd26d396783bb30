"""``moeserve.v1.Inference``: messages to client requests, and deltas to chunks.

What they mean is the service's business.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.message import Message

import moeserve
from moeserve.core import FinishReason, Grammar, GrammarKind, Logprobs
from moeserve.errors import InvalidRequestError
from moeserve.gateway import limits
from moeserve.gateway.grpc.statuses import Context, Method, bytes_of, call
from moeserve.gateway.limits import MAX_IDS, MAX_LOGIT_BIAS, MAX_STOP, MAX_STOP_IDS
from moeserve.gateway.service import ClientRequest, InferenceService, ServiceState
from moeserve.gateway.stream import Delta, Durations, Usage
from moeserve.pb import inference_pb2 as pb

SERVICE = "moeserve.v1.Inference"
# Fields that are looked at one by one.
_FEW = (
    ("stop", MAX_STOP, "strings"),
    ("stop_token_ids", MAX_STOP_IDS, "ids"),
    ("logit_bias", MAX_LOGIT_BIAS, "entries"),
    ("allowed_token_ids", limits.MAX_ALLOWED_IDS, "ids"),
    ("bad_words", limits.MAX_BAD_WORDS, "words"),
)
_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class InferenceMethods:
    """The methods, for one service."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    def handlers(self) -> grpc.GenericRpcHandler:
        unary: dict[str, tuple[Method, type[Message]]] = {
            "GenerateUnary": (self._generate_unary, pb.GenerateRequest),
            "Tokenize": (self._tokenize, pb.TokenizeRequest),
            "Detokenize": (self._detokenize, pb.DetokenizeRequest),
            "Abort": (self._abort, pb.AbortRequest),
            "GetModelInfo": (self._model_info, pb.GetModelInfoRequest),
            "GetLoad": (self._load, pb.GetLoadRequest),
        }
        handlers: dict[str, _Handler] = {
            name: grpc.unary_unary_rpc_method_handler(
                functools.partial(call, method, kind), response_serializer=bytes_of
            )
            for name, (method, kind) in unary.items()
        }
        handlers["Generate"] = grpc.unary_stream_rpc_method_handler(
            functools.partial(call, self._generate, pb.GenerateRequest),
            response_serializer=bytes_of,
        )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def _generate(self, request: pb.GenerateRequest, context: Context) -> None:
        # Writing here, and not yielding, lets a cancelled call raise inside the ``async with``.
        wanted = _client_request(request, context.time_remaining())
        async with await self._service.open(wanted) as stream:
            scored = [0] * len(stream.prompts)
            async for delta in stream:
                chunk = _chunk(stream.request_id, delta)
                if delta.prompt_logprobs:
                    i, first = delta.index, 1 + scored[delta.index]
                    scored[i] += len(delta.prompt_logprobs)
                    ids = stream.prompts[i][first:]
                    chunk.prompt_logprobs.extend(_scores(ids, delta.prompt_logprobs))
                await context.write(chunk)

    async def _generate_unary(
        self, request: pb.GenerateRequest, context: Context
    ) -> pb.GenerateResponse:
        wanted = _client_request(request, context.time_remaining())
        texts: dict[int, list[str]] = {}
        scores: dict[int, list[Logprobs]] = {}
        outputs: dict[int, pb.Output] = {}
        async with await self._service.open(wanted) as stream:
            async for delta in stream:
                output = outputs.setdefault(delta.index, pb.Output(index=delta.index))
                texts.setdefault(delta.index, []).append(delta.text)
                output.token_ids.extend(delta.token_ids)
                output.logprobs.extend(_scores(delta.token_ids, delta.logprobs))
                scores.setdefault(delta.index, []).extend(delta.prompt_logprobs)
                if delta.finish is not None:
                    output.text = "".join(texts[delta.index])
                    prompt = stream.prompts[delta.index][1:]
                    if prompt_scores := scores[delta.index]:
                        # So many numbers that others would wait for them.
                        written = await asyncio.to_thread(_scores, prompt, prompt_scores)
                        output.prompt_logprobs.extend(written)
                    _close_with(output, delta)
        return pb.GenerateResponse(
            request_id=stream.request_id,
            model=self._service.served.name,
            outputs=[outputs[index] for index in sorted(outputs)],
        )

    async def _tokenize(self, request: pb.TokenizeRequest, _: Context) -> pb.TokenizeResponse:
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        ids = await self._service.tokenize(request.model, request.text, special)
        return pb.TokenizeResponse(token_ids=ids, max_model_len=self._service.served.limits.max_len)

    async def _detokenize(self, request: pb.DetokenizeRequest, _: Context) -> pb.DetokenizeResponse:
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        ids = _ids(request.token_ids, "token_ids")
        text = await self._service.detokenize(request.model, ids, skip)
        return pb.DetokenizeResponse(text=text)

    async def _abort(self, request: pb.AbortRequest, _: Context) -> pb.AbortResponse:
        self._service.abort(request.request_id)
        return pb.AbortResponse()

    async def _model_info(
        self, request: pb.GetModelInfoRequest, _: Context
    ) -> pb.GetModelInfoResponse:
        served = self._service.served
        return pb.GetModelInfoResponse(
            model=served.name,
            architecture=served.architecture,
            vocab_size=served.limits.vocab_size,
            max_model_len=served.limits.max_len,
            eos_token_ids=served.eos_ids,
            has_tokenizer=served.tokenizer is not None,
            server_version=moeserve.__version__,
        )

    async def _load(self, request: pb.GetLoadRequest, _: Context) -> pb.GetLoadResponse:
        load = self._service.served.engine.load()
        return pb.GetLoadResponse(
            running=load.running,
            waiting=load.waiting,
            total_blocks=load.total_blocks,
            free_blocks=load.free_blocks,
            block_size=load.block_size,
            ready=self._service.state is ServiceState.READY,
        )


def _client_request(request: pb.GenerateRequest, time_remaining: float | None) -> ClientRequest:
    sampling = request.sampling
    for name, most, unit in _FEW:
        if (given := len(getattr(sampling, name))) > most:
            raise InvalidRequestError(f"{name}: {given} {unit}, at most {most}", param=name)
    params: dict[str, object] = {
        field.name: value
        for field, value in sampling.ListFields()
        if not field.is_repeated and field.name != "grammar"
    }
    if sampling.logit_bias:
        params["logit_bias"] = dict(sampling.logit_bias)
    for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
        if values := list(getattr(sampling, name)):
            params[name] = values
    if sampling.HasField("grammar"):
        params["grammar"] = _grammar(sampling.grammar)
    cut = request.truncate_prompt_tokens if request.HasField("truncate_prompt_tokens") else None
    match request.WhichOneof("prompt"):
        case "text":
            prompt: str | tuple[int, ...] = request.text
        case "token_ids":
            prompt = _ids(request.token_ids.ids, "prompt")
        case _:
            raise InvalidRequestError(
                "the prompt is missing: set text or token_ids", param="prompt"
            )
    return ClientRequest(
        prompts=(prompt,),
        params=params,
        n=request.n or 1,
        request_id=request.request_id,
        model=request.model,
        salt=request.cache_salt,
        domain=request.domain,
        timeout_s=time_remaining,
        truncate=None if cut is None else limits.truncation(cut),
        resume_from=request.resume_from_token,
        priority=request.priority,
    )


def _ids(field: Sequence[int], name: str) -> tuple[int, ...]:
    """As Python has them, which takes long where there are many."""
    if len(field) > MAX_IDS:
        raise InvalidRequestError(f"{name}: {len(field)} ids, at most {MAX_IDS}", param=name)
    return tuple(field)


def _grammar(given: pb.Grammar) -> Grammar:
    kind = given.WhichOneof("kind")
    if kind is None:
        raise InvalidRequestError("the grammar is missing: set one of its kinds", param="grammar")
    if kind == "choice":
        if not given.choice.texts or not all(given.choice.texts):
            raise InvalidRequestError("choice: expected texts, none empty", param="grammar")
        text = json.dumps(list(given.choice.texts), ensure_ascii=False)
    else:
        text = getattr(given, kind)
    return Grammar(
        GrammarKind(kind), text, given.whitespace if given.HasField("whitespace") else None
    )


def _chunk(request_id: str, delta: Delta) -> pb.GenerateChunk:
    chunk = pb.GenerateChunk(
        request_id=request_id,
        index=delta.index,
        text_delta=delta.text,
        token_ids=delta.token_ids,
        logprobs=_scores(delta.token_ids, delta.logprobs),
    )
    if delta.finish is not None:
        _close_with(chunk, delta)
    return chunk


def _close_with(message: pb.GenerateChunk | pb.Output, delta: Delta) -> None:
    message.finish_reason = _FINISH[cast("FinishReason", delta.finish)]
    usage, timing = cast("Usage", delta.usage), cast("Durations", delta.timing)
    message.usage.CopyFrom(
        pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        )
    )
    message.timing.CopyFrom(
        pb.Timing(ttft_s=timing.ttft_s, tpot_s=timing.tpot_s, total_s=timing.total_s)
    )


def _scores(token_ids: Sequence[int], logprobs: Sequence[Logprobs]) -> list[pb.Logprobs]:
    """As many as there are log-probabilities."""
    return [
        pb.Logprobs(chosen=pb.TokenLogprob(token_id=token, logprob=entry.chosen), top=_top(entry))
        for token, entry in zip(token_ids, logprobs, strict=False)
    ]


def _top(entry: Logprobs) -> list[pb.TokenLogprob]:
    return [pb.TokenLogprob(token_id=token, logprob=value) for token, value in entry.top]
