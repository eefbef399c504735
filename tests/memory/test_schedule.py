"""Schedules against brute force, the closed forms of Griewank and Walther (2000), and a chain that executes them."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import cache
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowdeep.chain import schedule
from narrowdeep.chain.schedule import Action, Op, ScheduleError

lengths = st.integers(1, 300)


@cache
def brute_force(length: int, snapshots: int) -> int:
    """Advances of the best schedule, by dynamic programming over where to put the next snapshot."""
    if length == 1:
        return 0
    if snapshots == 1:
        return length * (length - 1) // 2
    return min(m + brute_force(length - m, snapshots - 1) + brute_force(m, snapshots) for m in range(1, length))


@pytest.mark.parametrize("snapshots", [1, 2, 3, 5, 17, 60])
def test_binomial_is_optimal(snapshots: int) -> None:
    for length in range(1, 60):
        cost = schedule.simulate(schedule.binomial(length, snapshots), length, snapshots)
        assert cost.advances == brute_force(length, snapshots) == schedule.fewest_advances(length, snapshots)


@pytest.mark.parametrize(
    ("length", "snapshots", "advances"),
    # Worked out by hand: one slot is l(l-1)/2; l slots are l-1; at l = C(s+r, s) the formula is r l - C(s+r, s+1).
    [(1, 1, 0), (10, 1, 45), (10, 10, 9), (10, 100, 9), (10, 3, 2 * 10 - 5), (comb(8, 3), 3, 5 * 56 - 70)],
)
def test_known_costs(length: int, snapshots: int, advances: int) -> None:
    assert schedule.fewest_advances(length, snapshots) == advances
    assert schedule.simulate(schedule.binomial(length, snapshots), length, snapshots).advances == advances


@pytest.mark.parametrize("snapshots", [1, 2, 3, 6])
@pytest.mark.parametrize("sweeps", [0, 1, 2, 4])
def test_reach_is_where_one_more_sweep_is_needed(snapshots: int, sweeps: int) -> None:
    """Within C(s+r, s) segments none is advanced more than r times, and one segment more breaks that."""

    def most_sweeps(length: int) -> int:
        runs = [0] * length
        current = 0
        for action in schedule.binomial(length, snapshots):
            if action.op == Op.ADVANCE:
                for i in range(current, action.segment):
                    runs[i] += 1
            if action.op in (Op.ADVANCE, Op.LOAD):
                current = action.segment
        return max(runs)

    reached = schedule.reach(snapshots, sweeps)
    assert reached == comb(snapshots + sweeps, snapshots)
    assert schedule.fewest_sweeps(reached, snapshots) == sweeps == most_sweeps(reached)
    assert schedule.fewest_sweeps(reached + 1, snapshots) == sweeps + 1 == most_sweeps(reached + 1)


@given(lengths, st.integers(1, 40))
def test_binomial_reverses_every_segment_once_in_order(length: int, snapshots: int) -> None:
    actions = list(schedule.binomial(length, snapshots))
    assert [a.segment for a in actions if a.op == Op.REVERSE] == list(range(length))[::-1]
    alive: dict[int, int] = {}
    for action in actions:  # written apart from schedule.simulate on purpose
        if action.op == Op.STORE:
            assert action.slot not in alive
            alive[action.slot] = action.segment
        if action.op in (Op.LOAD, Op.FREE):
            assert alive[action.slot] == action.segment
        if action.op == Op.FREE:
            del alive[action.slot]
        assert len(alive) <= snapshots
        assert all(0 <= slot < snapshots for slot in alive)
    assert not alive


@given(lengths, lengths)
def test_two_level_costs(length: int, block: int) -> None:
    blocks = [min(block, length - start) for start in range(0, length, block)]
    snapshots = len(blocks) + max(0, max(blocks) - 2)
    cost = schedule.simulate(schedule.two_level(length, block), length, snapshots)
    assert cost.advances == length - 1 + sum(size - 1 for size in blocks[:-1])


@given(lengths)
def test_uniform_keeps_everything(length: int) -> None:
    assert schedule.simulate(schedule.uniform(length), length, length) == schedule.Cost(length - 1, length, length)


@given(lengths, st.integers(1, 40))
def test_encoding_round_trips(length: int, snapshots: int) -> None:
    actions = list(schedule.binomial(length, snapshots))
    flat = schedule.encode(actions, length, snapshots)
    assert flat.itemsize == 8
    assert len(flat) == 2 + 3 * len(actions)
    assert schedule.decode(flat) == (actions, length, snapshots)


@given(lengths, st.integers(1, 40))
def test_a_backward_apart_from_its_forward(length: int, snapshots: int) -> None:
    """The first sweep's snapshots are told beforehand, and going on from the last of them costs what it must."""
    actions = list(schedule.binomial(length, snapshots))
    first = next(i for i, action in enumerate(actions) if action.op == Op.REVERSE)
    kept = schedule.first_snapshots(length, snapshots)
    assert kept == [action.segment for action in actions[:first] if action.op == Op.STORE]
    resumed = list(schedule.resumed(actions))
    assert resumed[:first] == actions[:first]
    assert resumed[first] == Action(Op.LOAD, kept[-1], len(kept) - 1)
    cost = schedule.simulate(resumed, length, snapshots)
    assert cost.advances == schedule.fewest_advances(length, snapshots) + length - 1 - kept[-1]


@pytest.mark.parametrize("length", [1, 2, 5, 17])
@pytest.mark.parametrize(
    "build",
    [
        lambda n: (schedule.binomial(n, 1), 1),
        lambda n: (schedule.binomial(n, 3), 3),
        lambda n: (schedule.resumed(schedule.binomial(n, 2)), 2),
        lambda n: (schedule.two_level(n, 4), n + 2),
        lambda n: (schedule.uniform(n), n),
    ],
)
def test_an_engine_that_executes_the_numbers(build, length: int) -> None:
    """Gradients of a chain y -> a_i sin(y), reversed as the encoded numbers say, against the chain rule."""
    factors = [1.0 + 0.1 * i for i in range(length)]
    states = [0.7]
    for a in factors:
        states.append(a * math.sin(states[-1]))
    expected = math.prod(a * math.cos(y) for a, y in zip(factors, states, strict=False))

    actions, snapshots = build(length)
    flat = schedule.encode(actions, length, snapshots)
    slots, current, at, gradient = [math.nan] * flat[1], 0.7, 0, 1.0
    for i in range(2, len(flat), 3):
        op, segment, slot = flat[i : i + 3]
        if op == 0:
            for a in factors[at:segment]:
                current = a * math.sin(current)
            at = segment
        elif op == 1:
            slots[slot] = current
        elif op == 2:
            current, at = slots[slot], segment
        elif op == 3:
            gradient *= factors[segment] * math.cos(current)
            current = math.nan
        else:
            slots[slot] = math.nan
    assert gradient == pytest.approx(expected, rel=1e-12)


def test_encoded_layout() -> None:
    """Two segments, one slot, by hand: keep state 0, run segment 0, reverse 1, load 0, reverse 0, give it back."""
    flat = schedule.encode(schedule.binomial(2, 1), 2, 1)
    assert list(flat) == [2, 1, 1, 0, 0, 0, 1, -1, 3, 1, -1, 2, 0, 0, 3, 0, -1, 4, 0, 0]


@given(st.data(), st.integers(2, 30), st.integers(1, 6))
def test_a_schedule_with_an_action_missing_is_refused(data: st.DataObject, length: int, snapshots: int) -> None:
    actions = list(schedule.binomial(length, snapshots))
    needed = [i for i, a in enumerate(actions) if a.op in (Op.STORE, Op.LOAD, Op.REVERSE)]
    # An ADVANCE whose absence only delays the next one, and a FREE at the end, can be missed: leave those in.
    del actions[data.draw(st.sampled_from(needed))]
    with pytest.raises(ScheduleError):
        schedule.simulate(actions, length, snapshots)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([Action(Op.REVERSE, 0)], "segment 1 is the next to reverse"),
        ([Action(Op.REVERSE, 1)], "the current state is 0"),
        ([Action(Op.LOAD, 0, 0)], "the slot holds nothing"),
        ([Action(Op.STORE, 0, 0), Action(Op.ADVANCE, 1), Action(Op.LOAD, 1, 0)], "the slot holds state 0"),
        ([Action(Op.STORE, 0, 0), Action(Op.STORE, 0, 0)], "the slot holds state 0"),
        ([Action(Op.STORE, 0, 1)], "slot must be in 0 .. 0"),
        ([Action(Op.STORE, 1, 0)], "the current state is 0"),
        ([Action(Op.ADVANCE, 0)], "the current state is 0"),
        ([Action(Op.ADVANCE, 2)], "2 segments are left"),
        ([Action(Op.ADVANCE, 1, 0)], "slot must be -1"),
        ([Action(Op.ADVANCE, 1), Action(Op.REVERSE, 1)], "1 of 2 segments not reversed"),
        ([Action(Op.ADVANCE, 1), Action(Op.REVERSE, 1), Action(Op.REVERSE, 0)], "the current state is None"),
    ],
)
def test_broken_schedules_are_refused(actions: list[Action], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.simulate(actions, 2, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "2 \\+ 3 numbers"),
        ([1, 1, 0], "2 \\+ 3 numbers"),
        ([0, 1], "at least 1"),
        ([1, 1, 9, 0, 0], "op must be in 0"),
    ],
)
def test_broken_encodings_are_refused(values: list[int], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule.decode(values)


@pytest.mark.parametrize("build", [schedule.binomial, schedule.two_level])
def test_bad_arguments(build) -> None:
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"must be at least 1, got {bad}"):
            list(build(bad, 1))
        with pytest.raises(ValueError, match=f"must be at least 1, got {bad}"):
            list(build(1, bad))
    with pytest.raises(TypeError, match=r"length must be an int, got 2\.0"):
        list(build(2.0, 1))


def test_needs_no_torch() -> None:
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('schedule', sys.argv[1]); "
        "m = u.module_from_spec(s); sys.modules['schedule'] = m; s.loader.exec_module(m); "
        "assert m.fewest_advances(10, 3) == 15; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, schedule.__file__], check=True)
