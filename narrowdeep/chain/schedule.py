"""Checkpoint schedules: in which order a chain is advanced, stored, loaded and reversed. Pure Python.

A chain has ``length`` segments; segment ``i`` takes state ``i`` to state ``i + 1``. Reversing segment ``i`` starts from
state ``i`` and the gradient of state ``i + 1`` (it computes what it needs inside the segment itself), so the segments
must be reversed from the last to the first, and state ``i`` must be at hand each time: kept in one of ``snapshots``
slots, or computed again from an earlier one. A schedule is an iterator of ``Action``s that does so, starting with the
chain's input, state 0, as the current state; it keeps state 0 in a slot of its own, which counts as a snapshot.

=============  =========================  =========================================================================
schedule       snapshots                  segments advanced
=============  =========================  =========================================================================
``uniform``    l                          l - 1
``two_level``  ceil(l / k) + k - 2        l - 1, and k - 1 again in each block of k >= 2 but the last
``binomial``   any s >= 1                 the fewest possible with s: ``fewest_advances(l, s)``
=============  =========================  =========================================================================

The binomial schedule is *revolve*: Griewank and Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000. Their
counts hold here: s snapshots and r sweeps reach C(s + r, s) segments.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import comb


class Op(IntEnum):
    """What an action does. The numbers are those of the flat encoding and never change."""

    ADVANCE = 0
    """Run segments forward until the current state is state ``segment``."""
    STORE = 1
    """Copy the current state, which is state ``segment``, into the free slot ``slot``."""
    LOAD = 2
    """Make the copy of state ``segment`` in slot ``slot`` the current state; the slot keeps it."""
    REVERSE = 3
    """Reverse segment ``segment`` from the current state; afterwards there is no current state."""
    FREE = 4
    """Give back slot ``slot``, which holds state ``segment``."""


NO_SLOT = -1
"""The slot of an action that uses none."""


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a schedule; ``segment`` and ``slot`` as ``Op`` says."""

    op: Op
    segment: int
    slot: int = NO_SLOT


@dataclass(frozen=True, slots=True)
class Cost:
    """What running a schedule takes."""

    advances: int
    """Segments run forward, each time counted; the forward inside a reversed segment is not."""
    stores: int
    """Copies into a slot."""
    snapshots: int
    """Slots in use at once, at most."""


class ScheduleError(ValueError):
    """An action that cannot be carried out where it stands, or a chain not reversed to its end."""


def _check_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def reach(snapshots: int, sweeps: int) -> int:
    """C(s + r, s): segments that ``snapshots`` reverse with no segment advanced more than ``sweeps`` times."""
    return comb(snapshots + sweeps, snapshots) if sweeps >= 0 else 0


def fewest_sweeps(length: int, snapshots: int) -> int:
    """The least r with ``reach(snapshots, r) >= length``."""
    _check_at_least_one(length=length, snapshots=snapshots)
    low, high = 0, 1
    while reach(snapshots, high) < length:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if reach(snapshots, middle) < length:
            low = middle + 1
        else:
            high = middle
    return low


def fewest_advances(length: int, snapshots: int) -> int:
    """The fewest segments any schedule with ``snapshots`` slots advances: r l - C(s + r, s + 1), r = fewest sweeps.

    Griewank and Walther (2000), theorem 1; s = 1 gives l (l - 1) / 2, s >= l gives l - 1.
    """
    r = fewest_sweeps(length, snapshots)
    return r * length - comb(snapshots + r, snapshots + 1)


def uniform(length: int) -> Iterator[Action]:
    """Keep every state of one sweep: ``length`` snapshots, nothing advanced twice."""
    return two_level(length, 1)


def two_level(length: int, block: int) -> Iterator[Action]:
    """Keep every ``block``-th state of one sweep; advance each block again, keeping all its states, to reverse it.

    With block = sqrt(length) the snapshots are about 2 sqrt(length), and each segment is advanced at most twice.
    """
    _check_at_least_one(length=length, block=block)
    starts = range(0, length, block)
    yield Action(Op.STORE, 0, 0)
    for slot, start in enumerate(starts[1:], 1):
        yield Action(Op.ADVANCE, start)
        yield Action(Op.STORE, start, slot)
    current = starts[-1]
    for slot, start in reversed(list(enumerate(starts))):
        stop = min(start + block, length)
        if current != start:
            yield Action(Op.LOAD, start, slot)
        for inside in range(start + 1, stop):
            yield Action(Op.ADVANCE, inside)
            if inside < stop - 1:  # the last one is reversed at once
                yield Action(Op.STORE, inside, len(starts) + inside - start - 1)
        yield Action(Op.REVERSE, stop - 1)
        for inside in range(stop - 2, start - 1, -1):
            inside_slot = slot if inside == start else len(starts) + inside - start - 1
            yield Action(Op.LOAD, inside, inside_slot)
            yield Action(Op.REVERSE, inside)
            if inside != start:
                yield Action(Op.FREE, inside, inside_slot)
        yield Action(Op.FREE, start, slot)
        current = -1


def _split(length: int, snapshots: int) -> int:
    """Segments to advance before the next snapshot: an m that attains t(l, s) = min m + t(l - m, s - 1) + t(m, s).

    The two parts' slopes must differ by one sweep, so reach(s, r - 2) <= m <= reach(s, r - 1) and
    reach(s - 1, r - 1) <= l - m <= reach(s - 1, r); the smallest such m.
    """
    r = fewest_sweeps(length, snapshots)
    return max(1, reach(snapshots, r - 2), length - reach(snapshots - 1, r))


def binomial(length: int, snapshots: int) -> Iterator[Action]:
    """The schedule that advances the fewest segments with ``snapshots`` slots; how many, ``fewest_advances`` says."""
    _check_at_least_one(length=length, snapshots=snapshots)
    stored = [0]  # states in slots 0, 1, ...: the next to be loaded is the last
    current = 0
    yield Action(Op.STORE, 0, 0)
    for last in range(length - 1, -1, -1):
        if current != stored[-1]:
            current = stored[-1]
            yield Action(Op.LOAD, current, len(stored) - 1)
        while current < last and len(stored) < snapshots:
            current += _split(last + 1 - current, snapshots - len(stored) + 1)
            yield Action(Op.ADVANCE, current)
            if current < last:  # a state that is reversed at once needs no slot
                yield Action(Op.STORE, current, len(stored))
                stored.append(current)
        if current < last:
            yield Action(Op.ADVANCE, last)
        yield Action(Op.REVERSE, last)
        current = -1
        if stored[-1] == last:
            yield Action(Op.FREE, last, len(stored) - 1)
            stored.pop()


def first_snapshots(length: int, snapshots: int) -> list[int]:
    """The states that the binomial schedule keeps in its first sweep, before it reverses anything."""
    _check_at_least_one(length=length, snapshots=snapshots)
    kept = [0]
    while len(kept) < snapshots and kept[-1] < length - 1:
        following = kept[-1] + _split(length - kept[-1], snapshots - len(kept) + 1)
        if following == length - 1:  # reversed at once
            break
        kept.append(following)
    return kept


def resumed(actions: Iterable[Action]) -> Iterator[Action]:
    """The schedule of a backward that starts apart from its forward, so without a current state.

    Up to the first REVERSE it is what a forward does on its way to the output; there the state stored last is loaded
    and advanced again.
    """
    stored = Action(Op.STORE, 0, 0)
    reversing = False
    for action in actions:
        if action.op == Op.STORE:
            stored = action
        if action.op == Op.REVERSE and not reversing:
            reversing = True
            yield Action(Op.LOAD, stored.segment, stored.slot)
            if stored.segment < action.segment:
                yield Action(Op.ADVANCE, action.segment)
        yield action


def _broken(number: int, action: Action, rule: str) -> ScheduleError:
    return ScheduleError(f"action {number} ({action.op.name} segment {action.segment} slot {action.slot}): {rule}")


def simulate(actions: Iterable[Action], length: int, snapshots: int) -> Cost:
    """Carry out ``actions`` on state numbers alone and count what they cost.

    Raises: ScheduleError at the first action that breaks a rule of ``Op``, uses a slot outside 0 .. snapshots - 1,
        or reverses a segment out of order; and when segments are left at the end.
    """
    _check_at_least_one(length=length, snapshots=snapshots)
    slots: dict[int, int] = {}
    current: int | None = 0
    left = length
    advances = stores = most = 0

    for number, action in enumerate(actions):
        op, segment, slot = action.op, action.segment, action.slot
        if op in (Op.STORE, Op.LOAD, Op.FREE) and not 0 <= slot < snapshots:
            raise _broken(number, action, f"slot must be in 0 .. {snapshots - 1}")
        if op in (Op.ADVANCE, Op.REVERSE) and slot != NO_SLOT:
            raise _broken(number, action, f"slot must be {NO_SLOT}")
        if op in (Op.LOAD, Op.FREE) and slots.get(slot) != segment:
            raise _broken(
                number, action, f"the slot holds {'nothing' if slot not in slots else f'state {slots[slot]}'}"
            )
        if op == Op.ADVANCE:
            if current is None or not current < segment < left:
                raise _broken(number, action, f"the current state is {current} and {left} segments are left")
            advances += segment - current
            current = segment
        elif op == Op.STORE:
            if current != segment:
                raise _broken(number, action, f"the current state is {current}")
            if slot in slots:
                raise _broken(number, action, f"the slot holds state {slots[slot]}")
            slots[slot] = segment
            stores += 1
            most = max(most, len(slots))
        elif op == Op.LOAD:
            current = segment
        elif op == Op.REVERSE:
            if segment != left - 1:
                raise _broken(number, action, f"segment {left - 1} is the next to reverse")
            if current != segment:
                raise _broken(number, action, f"the current state is {current}")
            current = None
            left -= 1
        else:
            del slots[slot]
    if left:
        raise ScheduleError(f"the schedule ends with {left} of {length} segments not reversed")
    return Cost(advances, stores, most)


def encode(actions: Iterable[Action], length: int, snapshots: int) -> array[int]:
    """A schedule as flat signed 64-bit integers for an engine to execute, checked by ``simulate``.

    Layout: ``[length, snapshots, op, segment, slot, op, segment, slot, ...]``, three numbers an action, ``op`` the
    number of its ``Op``, ``slot`` -1 where it has none. An engine needs ``snapshots`` slots and one current state.

    Raises: ScheduleError as ``simulate``.
    """
    listed = list(actions)
    simulate(listed, length, snapshots)
    flat = array("q", (length, snapshots))
    for action in listed:
        flat.extend((action.op, action.segment, action.slot))
    return flat


def decode(values: Sequence[int]) -> tuple[list[Action], int, int]:
    """``(actions, length, snapshots)`` of an encoded schedule, checked by ``simulate``.

    Raises: ScheduleError where the layout or the schedule is broken.
    """
    if len(values) < 2 or (len(values) - 2) % 3:
        raise ScheduleError(f"an encoded schedule must have 2 + 3 numbers an action, got {len(values)}")
    length, snapshots = values[0], values[1]
    if length < 1 or snapshots < 1:
        raise ScheduleError(f"length and snapshots must be at least 1, got {length} and {snapshots}")
    actions = []
    for i in range(2, len(values), 3):
        op, segment, slot = values[i : i + 3]
        if op not in Op._value2member_map_:
            raise ScheduleError(f"action {(i - 2) // 3}: op must be in 0 .. {len(Op) - 1}, got {op}")
        actions.append(Action(Op(op), segment, slot))
    simulate(actions, length, snapshots)
    return actions, length, snapshots
