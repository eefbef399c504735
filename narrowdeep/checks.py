"""Rules for the numbers that a user gives, in one place: what is taken, and in which words the rest is refused.

A count is a Python or numpy integer, a number any real one; bools, text and tensors are neither.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

LARGEST = 2**63 - 1
"""Of a count: the engine's are signed 64-bit integers."""


def shown(value: Any) -> str:
    """``repr``, cut where it is long; of an integer with so many digits that they hide the message, its size."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an int of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of more than 4300 digits, in a list either
        text = "an int of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def is_integer(value: Any) -> bool:
    """Whether ``value`` is a Python or numpy integer, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_count(name: str, value: Any, least: int, most: int = LARGEST) -> int:
    """``value`` as an int.

    Raises: TypeError or ValueError naming the argument, the rule and the value.
    """
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    count = int(value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(count)}")
    if count > most:
        rule = "below 2**63" if most == LARGEST else f"at most {most}"
        raise ValueError(f"{name} must be {rule}, got {shown(count)}")
    return count


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """``value`` as a finite float that is not negative, or ``positive``.

    Raises: TypeError or ValueError naming the argument, the rule and the value.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be finite and {'positive' if positive else 'not negative'}, got {shown(value)}")
    return number
