"""A server whose model says what a test tells it to, through a real tokenizer and real sockets.

The engine alone is played: it answers each request with the tokens of the next text in its script,
one event a token. So what clients see of tool calls and reasoning is known in advance.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest

from moeserve.core import Counters, Event, FinishReason, Request, RequestId
from moeserve.engine.loop import Engine
from moeserve.engine.request_state import EventSink
from moeserve.gateway.grammars import GrammarGate
from moeserve.gateway.http.app import http_app
from moeserve.gateway.http.server import HttpServer
from moeserve.gateway.limits import ModelLimits
from moeserve.gateway.mailbox import Mailbox
from moeserve.gateway.parsers.styles import ToolStyle, style_of
from moeserve.gateway.service import InferenceService, ServedModel
from moeserve.grammar.checking import GrammarChecker
from moeserve.grammar.worker import Vocabulary
from moeserve.models.tokenizer import Tokenizer

PATIENCE_S = 30.0
END = "<|im_end|>"
MARKERS: dict[str, list[str]] = {
    "hermes": ["<tool_call>", "</tool_call>", "<think>", "</think>"],
    "glm": [
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ],
    "harmony": [
        *"<|start|> <|channel|> <|message|> <|constrain|> <|end|> <|call|> <|return|>".split(),
    ],
    "deepseek": [
        *"<｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜>".split(),
        *"<｜tool▁call▁end｜> <｜tool▁sep｜> <think> </think>".split(),
    ],
}
SPECIAL = {"harmony", "deepseek"}
# Shows what it is given; the comment tells which parsers the model needs.
TEMPLATE = (
    "{#- MARKERS -#}"
    "{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{%- for m in messages %}[{{ m.role }}]{{ m.content if m.content is not none }}"
    "{%- if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{%- for c in m.tool_calls or [] %}{{ c.function.name }}={{ c.function.arguments | tojson }}"
    "{%- endfor %}<|im_end|>{% endfor %}"
    "{%- if add_generation_prompt %}[assistant]{% if opens %}<think>\n{% endif %}{% endif %}"
)


class ScriptedEngine:
    """Answers requests in the order of their coming, each with the next text of ``script``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.script: list[str] = []
        self.requests: list[Request] = []
        self.aborted: list[RequestId] = []
        self.pause_s = 0.0  # before the next answer
        self.breaks_at = 0  # the token instead of which the next answer breaks off
        self._tokenizer = tokenizer
        self.counters = Counters()
        self.alive = True
        self._speaking: list[asyncio.Task[None]] = []

    def submit(self, request: Request, sink: EventSink) -> None:
        self.requests.append(request)
        text = self.script.pop(0)
        say = self._say(request, sink, self._tokenizer.encode(text, False))
        self._speaking.append(asyncio.get_running_loop().create_task(say))

    async def _say(self, request: Request, sink: EventSink, ids: list[int]) -> None:
        end = self._tokenizer.token_to_id(END)
        assert end is not None
        pause_s, self.pause_s = self.pause_s, 0.0
        await asyncio.sleep(pause_s)
        for made, token in enumerate([*ids, end], 1):
            if request.id in self.aborted:
                return
            if made == self.breaks_at:
                self.breaks_at = 0
                sink.deliver([Event(request.id, finish=FinishReason.ERROR, error="it broke")])
                return
            stops = token == end or token in request.params.stop_token_ids
            finish = FinishReason.STOP if stops else None
            if finish is None and made == request.params.max_tokens:
                finish = FinishReason.LENGTH
            sink.deliver([Event(request.id, (token,), finish=finish)])
            if finish is not None:
                return
            await asyncio.sleep(0)

    def abort(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        self.aborted.append(request_id)

    def prompt(self, index: int = -1) -> str:
        """The rendered conversation of a request."""
        return self._tokenizer.decode(self.requests[index].prompt_ids, False)


class Stage:
    """A running server and the script its model follows."""

    def __init__(self, folder: Path, tools: ToolStyle) -> None:
        self._folder = folder
        self._tokenizer = Tokenizer.load(folder)
        self._tools = tools
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="stage")

    def says(self, *texts: str) -> None:
        """To the next requests."""
        self.engine.script = list(texts)

    def __enter__(self) -> Stage:
        self._thread.start()
        assert self._ready.wait(PATIENCE_S), "the server is not ready in time"
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.openai.close()
        self.http.close()
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server did not stop in time"

    async def _live(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self.engine = ScriptedEngine(self._tokenizer)
        service = InferenceService(Mailbox(self.loop))
        style = style_of(self._tokenizer.chat_template)
        assert style.tools == self._tools
        limits = ModelLimits(self._tokenizer.vocab_size, 4096)
        engine = cast(Engine, self.engine)
        end = self._tokenizer.token_to_id(END)
        assert end is not None
        file = self._folder / "tokenizer.json"
        checker = GrammarChecker(Vocabulary(file, self._tokenizer.vocab_size, (end,)))
        gate = GrammarGate(checker)
        service.serve(
            ServedModel("scripted", engine, self._tokenizer, limits, style=style, grammars=gate)
        )
        server = HttpServer(http_app(service, None, _no_metrics), "127.0.0.1", 0, 1.0)
        self.port = server.port
        server.open()
        self._ready.set()
        await self._end.wait()
        await server.close()
        await service.texts.close()
        checker.close()


async def _no_metrics() -> tuple[bytes, str]:
    return b"", "text/plain"


def save_scripted_tokenizer(folder: Path, tools: ToolStyle) -> None:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    special = tools in SPECIAL
    inner.add_tokens([AddedToken(m, special=special, normalized=False) for m in MARKERS[tools]])
    inner.save(str(folder / "tokenizer.json"))
    template = TEMPLATE.replace("MARKERS", " ".join(MARKERS[tools]))
    settings: dict[str, Any] = {"eos_token": END, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def open_stage(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ToolStyle], Stage]:
    """A server for a model of a family's style, to be entered."""

    def build(tools: ToolStyle) -> Stage:
        folder = tmp_path_factory.mktemp(tools)
        save_scripted_tokenizer(folder, tools)
        return Stage(folder, tools)

    return build


@pytest.fixture(scope="module")
def stage(open_stage: Callable[[ToolStyle], Stage]) -> Iterator[Stage]:
    """Of a model that writes as Qwen3 does."""
    with open_stage("hermes") as stage:
        yield stage
