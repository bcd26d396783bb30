"""OpenAI's client, in the version that its requirements name: case and URL."""

import json
import sys

import openai
from pydantic import BaseModel

case, url = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


class Weather(BaseModel):
    """The weather of a city."""

    city: str


chat_tool = openai.pydantic_function_tool(Weather, name="weather")
flat_tool = {"type": "function"} | dict(chat_tool["function"])
ask = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}


def parse() -> dict:
    message = client.chat.completions.parse(**ask, tools=[chat_tool]).choices[0].message
    return {"args": message.tool_calls[0].function.parsed_arguments.model_dump()}


def stream() -> dict:
    with client.chat.completions.stream(**ask, tools=[chat_tool]) as events:
        message = events.until_done().get_final_completion().choices[0].message
    call = message.tool_calls[0].function
    return {"args": json.loads(call.arguments), "text": message.content}


def responses() -> dict:
    with client.responses.stream(model="scripted", input="Hello", tools=[flat_tool]) as events:
        final = events.until_done().get_final_response()
    return {"args": json.loads(final.output[-1].arguments), "text": final.output_text}


cases = {"parse": parse, "stream": stream, "responses": responses}
print(json.dumps(cases[case]()))
