"""Anthropic's client: case and URL."""

import json
import sys

from anthropic import Anthropic, BadRequestError

case, url = sys.argv[1:]
client = Anthropic(base_url=url, api_key="none", max_retries=0)
TOOLS = [
    {
        "name": "weather",
        "description": "The weather of a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
ask = {"model": "scripted", "max_tokens": 500, "tools": TOOLS}
messages = [{"role": "user", "content": "Hello"}]


def loop() -> dict:
    """A call, its result, and the answer."""
    first = client.messages.create(**ask, messages=messages)
    call = next(block for block in first.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    turn = [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(**ask, messages=messages + turn)
    return {"input": call.input, "stop": first.stop_reason, "text": second.content[0].text}


def stream() -> dict:
    """As its helper gathers it."""
    thinking = {"type": "adaptive"}
    with client.messages.stream(**ask, messages=messages, thinking=thinking) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    return {
        "text": text,
        "blocks": [block.type for block in final.content],
        "input": final.content[-1].input,
        "thinking": final.content[0].thinking,
        "tokens": final.usage.output_tokens,
    }


def count() -> dict:
    counted = client.messages.count_tokens(model="scripted", messages=messages)
    return {"input_tokens": counted.input_tokens}


def refusal() -> dict:
    try:
        client.messages.create(model="scripted", max_tokens=0, messages=messages)
    except BadRequestError as error:
        return {"type": error.body["error"]["type"]}
    return {}


cases = {"loop": loop, "stream": stream, "count": count, "refusal": refusal}
print(json.dumps(cases[case]()))
