"""Checks of what selects and weighs parameters: regular expressions and numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any


def checked_patterns(name: str, patterns: str | Sequence[str] | None) -> list[str]:
    """Regular expressions as a list; one may stand alone.

    Args:
        name: The argument's name, for the error.
        patterns: What the user gave.

    Raises:
        ValueError: It is not a list of regular expressions.
    """
    if patterns is None:
        return []
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, Sequence):
        raise ValueError(
            f"{name}={patterns!r} is not a list of regular expressions; give ['LayerNorm', 'bias$'], say."
        )
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"{name} contains {pattern!r}, which is not a string; give regular expressions.")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:  # a{9999999999}, thousands of brackets
            raise ValueError(
                f"{name} contains {pattern!r}, which is not a regular expression ({error}). Escape special "
                "characters with a backslash."
            ) from None
    return list(patterns)


def checked_number(name: str, value: Any) -> float:
    """A finite number that is not negative, as a float.

    Raises:
        ValueError: It is something else.
    """
    try:
        if isinstance(value, (bool, bytes, bytearray)):  # of which Python would make a float
            raise TypeError
        number = float(value)
    except OverflowError:  # of an integer that may have more digits than Python prints
        raise ValueError(f"{name} is too large for a float; give one >= 0, such as 0.01.") from None
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is not a number; give a float >= 0, such as 0.01.") from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name}={number!r} must be a finite number >= 0; use 0 to switch it off.")
    return number
