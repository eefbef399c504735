"""``python -m benchmarks.report bench.json [more.json ...]``: ratios, what bounds each row, floors, and a bar chart.

Times are the least over the rounds. A ratio is a peer's time over narrowdeep's, both from one file; when several files
hold the same row, the last one counts. A floor is the least ratio (or share of the peak) the project asks of itself.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peak import Limits

OURS = "narrowdeep"
PEAK = "peak"
PEERS = ("eager", "eager, checkpointed", "torch.compile", "JAX scan", "torch.func")


@dataclass
class Row:
    """One workload and measure: seconds by peer, floors by peer, and seconds by bound (none where operations are not
    counted)."""

    workload: str
    measure: str
    bounds: dict[str, float]
    floors: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def ratio(self, peer: str) -> float | None:
        """The peer's time over narrowdeep's; for PEAK, that of the multiply-adds at the machine's rate. None if not
        measured."""
        if OURS not in self.seconds:
            return None
        if peer == PEAK:
            return self.bounds["arithmetic"] / self.seconds[OURS] if self.bounds else None
        return self.seconds[peer] / self.seconds[OURS] if peer in self.seconds else None

    def bound(self) -> str:
        """What bounds the row most, and the share of narrowdeep's time that it would take; nothing if not counted."""
        if OURS not in self.seconds or not self.bounds:
            return ""
        name = max(self.bounds, key=self.bounds.__getitem__)
        return f"{name}, {self.bounds[name] / self.seconds[OURS]:.0%}"

    def kept(self) -> list[str]:
        """Peers (or PEAK) whose ratio was measured and reaches its floor."""
        ratios = {peer: self.ratio(peer) for peer in self.floors}
        return [peer for peer, ratio in ratios.items() if ratio is not None and ratio >= self.floors[peer]]

    def missed(self) -> list[str]:
        """Peers (or PEAK) whose ratio was measured and is below its floor."""
        kept = self.kept()
        return [peer for peer in self.floors if self.ratio(peer) is not None and peer not in kept]


def read_rows(reports: list[dict[str, Any]]) -> list[Row]:
    """The rows of pytest-benchmark's JSON objects, in the order of their first appearance."""
    rows: dict[tuple[str, str], Row] = {}
    for report in reports:
        of_this_report: dict[tuple[str, str], Row] = {}
        for benchmark in report["benchmarks"]:
            info = benchmark["extra_info"]
            key = (info["workload"], info["measure"])
            row = of_this_report.setdefault(key, Row(*key, bounds(info, report["machine_info"]), info["floors"]))
            row.seconds[info["peer"]] = benchmark["stats"]["min"]
            row.errors[info["peer"]] = info["error"]
        rows |= of_this_report
    return list(rows.values())


def bounds(info: dict[str, Any], machine_info: dict[str, Any]) -> dict[str, float]:
    """Seconds by what bounds a benchmark's work; empty where that is not counted."""
    work = {name: info[name] for name in ("flops", "dependent", "traffic")}
    return {} if None in work.values() else Limits(**machine_info["limits"]).seconds(**work)


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def cell(row: Row, peer: str) -> str:
    """Ratio and floor, bold with a word where the floor is missed."""
    ratio, floor = row.ratio(peer), row.floors.get(peer)

    def number(value: float) -> str:
        if peer == PEAK:
            return f"{value:.2g}%" if value < 10 else f"{value:.0f}%"
        return f"{value:.2f}x" if value < 10 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"

    unit = 100 if peer == PEAK else 1
    if ratio is None:
        return "" if floor is None else "not measured"
    if floor is None:
        return number(ratio * unit)
    wanted = f"{floor * unit:g}{'%' if peer == PEAK else 'x'}"
    if ratio < floor:
        return f"**{number(ratio * unit)}, below {wanted}**"
    return f"{number(ratio * unit)} (floor {wanted})"


def table(rows: list[Row]) -> str:
    """A Markdown table: narrowdeep's time, its bound and the share of it, the share of the peak, and how many times
    longer each peer takes."""
    peers = [peer for peer in PEERS if any(peer in row.seconds or peer in row.floors for row in rows)]
    lines = [
        ["work", "measure", f"{OURS}, ms", "bound", "of FMA peak", *peers],
        ["---", "---", "---:", "---", "---:", *("---:" for _ in peers)],
    ]
    for row in rows:
        times = [row.workload, row.measure, milliseconds(row.seconds.get(OURS)), row.bound()]
        lines.append([*times, *(cell(row, peer) for peer in (PEAK, *peers))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(report: dict[str, Any]) -> str:
    info = report["machine_info"]
    limits = Limits(**info["limits"])
    return (
        f"{info['cpu'].get('brand_raw', info['machine'])}, {info['threads']} threads, {info['vector']}, "
        f"torch {info['torch']}, measured in registers {limits.peak_flops / 1e9:.0f} GFLOP/s in float32, "
        f"{limits.latency * 1e9:.2f} ns from one multiply-add to the next, memory {limits.bandwidth / 1e9:.1f} GB/s"
    )


def plot(rows: list[Row], path: Path) -> None:
    """A bar chart: one group of bars a row, a bar a peer, milliseconds on a log scale."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    peers = [peer for peer in (OURS, *PEERS) if any(peer in row.seconds for row in rows)]
    colours = dict(zip((OURS, *PEERS), ("#d1495b", "#30638e", "#8fb8de", "#6b4e71", "#edae49", "#66a182"), strict=True))
    height = 1 / 6  # of a bar, in inches
    tall = sum(len(row.seconds) + 1.2 for row in rows) * height
    figure, axes = plt.subplots(figsize=(11, tall + 1.2), layout="constrained")
    position, ticks, labelled = 0.0, [], set()
    for row in rows:
        present = [peer for peer in peers if peer in row.seconds]
        ticks.append(position + (len(present) - 1) / 2)
        for peer in present:
            value = row.seconds[peer] * 1e3
            axes.barh(position, value, 0.9, color=colours[peer], label=None if peer in labelled else peer)
            labelled.add(peer)
            ratio = row.ratio(peer)
            text = milliseconds(row.seconds[peer]) + ("" if peer == OURS or ratio is None else f"  ({ratio:.3g}x)")
            axes.text(value * 1.05, position, text, va="center", fontsize=7)
            position += 1
        position += 1.2
    axes.set_yticks(ticks, [f"{row.workload}\n{row.measure}" for row in rows], fontsize=8)
    axes.set_ylim(position - 0.7, -0.8)
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 3)
    axes.set_xlabel("milliseconds (log scale); in brackets, times narrowdeep's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(peers), frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Table and chart of benchmarks.")
    parser.add_argument("files", nargs="+", type=Path, help="JSON written by pytest --benchmark-json")
    parser.add_argument("--plot", type=Path, default=Path("bench.png"), help="where the bar chart goes")
    options = parser.parse_args(arguments)
    reports = [json.loads(path.read_text()) for path in options.files]
    rows = read_rows(reports)
    print(f"\n{machine(reports[-1])}\n\n{table(rows)}\n")
    missed = [(row, peer) for row in rows for peer in row.missed()]
    for row, peer in missed:
        print(f"below its floor: {row.workload}, {row.measure}, {'share of the FMA peak' if peer == PEAK else peer}")
    print(f"{sum(len(row.kept()) for row in rows)} floors kept, {len(missed)} missed")
    plot(rows, options.plot)
    print(f"bar chart: {options.plot}")


if __name__ == "__main__":
    main()
