"""One case: a call with good arguments, or with one of them replaced by nonsense, made and judged.

A case is a pair of numbers, (seed, number), and the same on every machine. A good call is compared with eager layers in
float64. A bad one, four in ten, must raise an error of the library's own.
"""

from __future__ import annotations

import math
import random
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import narrowdeep
from tests.fuzz.calls import KINDS, Call
from tests.fuzz.network import Skip

OURS = str(Path(narrowdeep.__file__).parent)
ERRORS = (TypeError, ValueError, NotImplementedError, RuntimeError)
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}

HUGE = 10**400
NUMBERS = (-1.5, math.nan, math.inf, -math.inf, "one", True, HUGE, [1.0], 1j, object(), torch.ones(2))
COUNTS = (-1, -(2**63), 2**63, HUGE, 2.5, math.nan, "three", True, [3], 1j, object(), torch.ones(2, dtype=torch.int64))
RAW_COUNTS = (-1, -(2**63), 2**63 - 1, 2**62, 2**31, 10**6, *COUNTS)
TEXTS = ("twelve", "", 3.5, b"offset", ["plain"], 1j, object(), torch.ones(2))
TUPLES = ((), (0, 0), (2, "3"), (HUGE, 1), (math.nan, 1, 1), (1, 2, 3, 4, 5), object(), {"a": 1})
DTYPES = (torch.int64, torch.float16, torch.complex64, "float32", 32, object())
BOOLS = ("yes", 2.5, [True], object(), torch.ones(2))
MODELS = (None, "model", torch.nn.Linear, object(), 3)


def _nonsense(rng: random.Random, call: Call, name: str) -> Any:
    """What ``name`` cannot be, whatever the other arguments are; of a raw op, what it may not be."""
    value = call.arguments[name]
    if isinstance(value, Tensor):
        return _bad_tensor(rng, value, name)
    kinds = ((bool, BOOLS), (int, RAW_COUNTS if call.raw else COUNTS), (float, NUMBERS), (str, TEXTS), (tuple, TUPLES))
    for kind, values in (*kinds, (torch.dtype, DTYPES), (torch.nn.Module, MODELS)):
        if isinstance(value, kind):
            return rng.choice(values)
    raise TypeError(f"no nonsense for {name}, {type(value).__name__}")


def _bad_tensor(rng: random.Random, t: Tensor, name: str) -> Any:
    makers: list[Any] = [
        *(lambda d=d: t.to(d) for d in (torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex128)),
        *(lambda v=v: v for v in (3, "x", [[1.0]], {"x": 1}, object())),
        lambda: t.contiguous().to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
        lambda: t.new_zeros(()),
        lambda: t.to("meta"),
        lambda: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
    ]
    if name != "x2":
        makers.append(lambda: None)
    if not name.startswith("x"):
        makers += [lambda: t[None], lambda: torch.cat((t, t, t.new_ones(1, *t.shape[1:])))]
    return rng.choice(makers)()


def run(seed: int, number: int, counts: Counter[str], verbose: bool = False) -> str | None:
    """Run one case. Returns what is wrong with it, or None."""
    rng = random.Random(f"{seed}/{number}")
    torch.manual_seed(rng.getrandbits(60))
    torch.set_num_threads(rng.choice([1, 2, 3]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call, changed = rng.choice(KINDS)(rng), None
        if rng.random() < 0.4:
            changed = rng.choice([name for name in call.arguments if name not in call.keep])
            call.arguments[changed] = _nonsense(rng, call, changed)
        if verbose:
            print(call.name, "with", *(f"\n  {name} = {_shown(value)}" for name, value in call.arguments.items()))
        return _judge_bad(call, changed, counts) if changed else _judge_good(call, counts)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.layout} {'nested' if value.is_nested else tuple(value.shape)} on {value.device}"
    return type(value).__name__ if isinstance(value, torch.nn.Module) else "10**400" if value is HUGE else repr(value)


def _judge_bad(call: Call, changed: str, counts: Counter[str]) -> str | None:
    counts["bad"] += 1
    title = f"{call.name} with {changed} = {_shown(call.arguments[changed])}"
    try:
        call.function(**call.arguments)
    except ERRORS as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if str(error) and (last.startswith(OURS) or (call.raw and last.endswith("_ops.py"))):
            return None
        return f"{title} raised, in words that are not ours:\n{traceback.format_exc()}"
    except Skip:
        return None
    except Exception:
        return f"{title} raised:\n{traceback.format_exc()}"
    return None if call.raw else f"{title} raised nothing"


def _judge_good(call: Call, counts: Counter[str]) -> str | None:
    try:
        found, expected = call.function(**call.arguments), call.expected()
    except Skip:
        counts["skipped"] += 1
        return None
    except Exception:
        return f"{call.name} raised:\n{traceback.format_exc()}"
    counts["good"] += 1
    if [a.shape for a in found] != [b.shape for b in expected]:
        return f"{call.name}: shapes {[tuple(a.shape) for a in found]} instead of {[tuple(b.shape) for b in expected]}"
    # Of equal layers, say, that contract: where a sum cancels to nothing, the rounding of its terms is all there is.
    largest = max((float(b.abs().max()) for b in expected if b.numel()), default=0.0)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not b.numel():
            continue
        size, error = float(b.abs().max()), float((a.double() - b.double()).abs().max())
        if not error <= TOLERANCE[call.dtype] * size + torch.finfo(call.dtype).eps * largest + 1e-30:
            return (
                f"{call.name}: result {i} of {len(found)}, shape {tuple(a.shape)}, {call.dtype}, is {error:.2g} off "
                f"beside a size of {size:.2g}, {largest:.2g} of all results"
            )
    return None
