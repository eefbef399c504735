"""Numbers of bytes as text, both ways."""

from __future__ import annotations

import math
import re

from narrowdeep.checks import LARGEST, is_integer, shown

_UNITS = {"": 1, **{f"{prefix}B": 1000**i for i, prefix in enumerate(("", "k", "M", "G", "T"))}}
_UNITS |= {f"{prefix}iB": 1024**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)}
_UNITS_BY_LOWER = {unit.lower(): factor for unit, factor in _UNITS.items()}


def parse_bytes(value: int | str, name: str = "budget") -> int:
    """Bytes from an int, or from text such as "2GiB" or "1.5 MB": units of 1000 (kB, MB, ...) or of 1024 (KiB, ...).

    Raises: TypeError for other types; ValueError for other text and for what is below 1 byte or not finite.
    """
    if not isinstance(value, str) and not is_integer(value):
        raise TypeError(f'{name} must be bytes as an int, or text such as "2GiB" or "500MB", got {value!r}')
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([a-z]*)\s*", value.lower())
        if match is None or match[2] not in _UNITS_BY_LOWER or len(value) > 60 or not math.isfinite(float(match[1])):
            units = ", ".join(unit for unit in _UNITS if unit)
            raise ValueError(f"{name} must be a number and one of the units {units}, or bytes, got {value!r}")
        number = int(match[1]) if match[1].isdigit() else float(match[1])
        parsed = int(number * _UNITS_BY_LOWER[match[2]])
    else:
        parsed = int(value)
    if parsed < 1:
        raise ValueError(f"{name} must be at least 1 byte, got {shown(value)}")
    if parsed > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST} bytes, got {shown(value)}")
    return parsed


def format_bytes(count: int) -> str:
    """Three digits and a binary unit: 1536 is "1.50 KiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    digits = 0 if unit == "B" or size >= 1000 else 3 - len(str(int(size)))
    return f"{size:.{digits}f} {unit}"
