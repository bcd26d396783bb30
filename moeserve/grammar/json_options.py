"""How JSON is written in answers, in llguidance's options: the ``x-guidance`` of a schema."""

from __future__ import annotations

# Between the tokens of a JSON document: one blank, or a new line and its indentation. A model that
# is free to write blanks may never write anything else.
WHITESPACE = r"( |\r?\n[ \t]{0,32})"


def json_options(whitespace: str | None = None) -> dict[str, object]:
    """Blanks are bounded, and no keyword of a schema is ignored, whatever the schema itself asks
    for. ``whitespace`` is ``core.Grammar``'s."""
    blanks = WHITESPACE if whitespace is None else whitespace
    flexible = {"whitespace_pattern": blanks} if blanks else {"whitespace_flexible": False}
    return {"lenient": False, "coerce_one_of": False, **flexible}
