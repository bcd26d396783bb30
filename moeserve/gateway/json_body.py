"""A request body as JSON: an object in UTF-8, without NaN, infinities and lone surrogates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from moeserve.errors import InvalidRequestError

Body = Mapping[str, Any]


def parse_json(raw: bytes) -> Body:
    """The object without its nulls, which say the same as an absent field."""
    try:
        body = json.loads(raw.decode(), parse_constant=_no_constant)
        if b"\\u" in raw:  # an escape can spell half of a surrogate pair, which is no text
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError("the body is not Unicode: it has a lone surrogate") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the body is not UTF-8 (byte {error.start}): send JSON in UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not JSON: {error}"[:300]) from error
    if not isinstance(body, dict):
        raise InvalidRequestError(f"the body is a JSON {type(body).__name__}, expected an object")
    return {name: value for name, value in body.items() if value is not None}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
