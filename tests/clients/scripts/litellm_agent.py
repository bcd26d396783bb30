"""litellm, as OpenAI's and as Anthropic's: case and URL."""

import json
import sys

import litellm

case, url = sys.argv[1:]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
messages = [{"role": "user", "content": "Hello"}]
openai = {"model": "openai/scripted", "api_base": f"{url}/v1", "api_key": "none"}
anthropic = {"model": "anthropic/scripted", "api_base": url, "api_key": "none"}
ask = {"messages": messages, "tools": TOOLS, "max_tokens": 500, "num_retries": 0}


def told(answer) -> dict:
    message = answer.choices[0].message
    call = message.tool_calls[0].function
    return {
        "content": message.content,
        "name": call.name,
        "arguments": json.loads(call.arguments),
        "finish": answer.choices[0].finish_reason,
        "reasoning": getattr(message, "reasoning_content", None),
    }


def whole() -> dict:
    return told(litellm.completion(**openai, **ask))


def stream() -> dict:
    chunks = list(litellm.completion(**openai, **ask, stream=True))
    return told(litellm.stream_chunk_builder(chunks, messages=messages))


def as_anthropic() -> dict:
    return told(litellm.completion(**anthropic, **ask))


def responses() -> dict:
    answer = litellm.responses(**openai, input="Hello")
    return {"text": answer.output[-1].content[0].text}


cases = {
    "whole": whole,
    "stream": stream,
    "as_anthropic": as_anthropic,
    "responses": responses,
}
print(json.dumps(cases[case]()))
