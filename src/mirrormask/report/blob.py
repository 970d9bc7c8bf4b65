"""Data as compact JSON that may stand inside a ``<script>`` element."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["DIGITS", "compact", "script_json"]

#: Significant digits of what charts and tables show; a page of 500 runs stays small.
DIGITS = 5


def compact(value: Any) -> Any:
    """``value`` with floats rounded to :data:`DIGITS` significant digits; what is not finite becomes None.

    Example:
        >>> compact({"a": [1 / 3, 2.0, float("nan"), 123456789]})
        {'a': [0.33333, 2, None, 123456789]}
    """
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        rounded = float(f"{value:.{DIGITS}g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    if isinstance(value, dict):
        return {str(key): compact(entry) for key, entry in value.items()}
    return [compact(entry) for entry in value]


def script_json(value: Any) -> str:
    """``value`` as JSON in which no markup can begin: ``</script>`` in a name must not end the element.

    Example:
        >>> print(script_json({"name": "</script><b>"}))
        {"name":"\\u003c/script\\u003e\\u003cb\\u003e"}
    """
    text = json.dumps(compact(value), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
