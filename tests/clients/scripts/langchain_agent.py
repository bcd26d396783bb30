"""langchain's ChatOpenAI: case and URL."""

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

case, url = sys.argv[1:]


class weather(BaseModel):
    """The weather of a city."""

    city: str


def model(**more) -> ChatOpenAI:
    return ChatOpenAI(model="scripted", base_url=f"{url}/v1", api_key="none", max_retries=0, **more)


def loop() -> dict:
    """A call, its result, and the answer."""
    bound = model().bind_tools([weather])
    history = [HumanMessage("Hello")]
    first = bound.invoke(history)
    [call] = first.tool_calls
    history += [first, ToolMessage("rain", tool_call_id=call["id"])]
    return {"args": call["args"], "text": bound.invoke(history).content}


def stream() -> dict:
    gathered = None
    for chunk in model().bind_tools([weather]).stream("Hello"):
        gathered = chunk if gathered is None else gathered + chunk
    return {"args": gathered.tool_calls[0]["args"], "text": gathered.content}


def responses() -> dict:
    answer = model(use_responses_api=True).bind_tools([weather]).invoke("Hello")
    return {"args": answer.tool_calls[0]["args"], "text": answer.text}


def structured() -> dict:
    """By a forced call, and by the form of the answer."""
    by_call = model().with_structured_output(weather, method="function_calling")
    by_form = model().with_structured_output(weather, method="json_schema")
    found = {"by_call": by_call.invoke("Hello").model_dump()}
    return found | {"by_form": by_form.invoke("Hello").model_dump()}


cases = {"loop": loop, "stream": stream, "responses": responses, "structured": structured}
print(json.dumps(cases[case]()))
