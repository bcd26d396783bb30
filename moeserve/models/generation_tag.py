"""``{% generation %}`` of chat templates: marks what a model is trained on, and renders its body.

From transformers' ``apply_chat_template``, which gathers what stands between the tags for training;
for a prompt they change nothing but the scope of names.
"""

from __future__ import annotations

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


class GenerationTag(Extension):
    """For an environment that compiles chat templates."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
