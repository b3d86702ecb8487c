"""``python -m lightning_diloco plan``: how long a run would take, and which bandwidth it needs.

Owns the arguments and the printed table; the numbers are those of :mod:`~lightning_diloco.cluster.planning`.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_diloco.cluster.patterns import PATTERNS
from lightning_diloco.cluster.planning import Plan, bandwidth_for, compute_utilisation, simulated_seconds

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
DESCRIPTION = """\
How long would a run take, and how busy would the machines be? Nothing is trained: equal
workers and equal links are counted through, for data parallelism, DiLoCo, Streaming DiLoCo,
with overlap, and in few bits.

  GB sent       by each worker over the whole run, in one direction, as the pattern needs them
                (in a ring of N workers 2(N-1)/N of the model per synchronisation); 10^9 bytes
  seconds       the last synchronisation included
  utilisation   share of the seconds in which workers compute
  Gbit/s for    bandwidth of every link for that utilisation; "never" where latency and
                overheads alone keep the run from it
"""
EPILOG = """\
example:
  python -m lightning_diloco plan --parameters 1e9 --step-seconds 0.1 --bandwidth-gbit-s 1 \\
      --interval 100 --workers 4 --steps 10000 --fragments 8 --overlap 1

Gradients of data parallelism are counted after the backward pass. Dense values cross in a
ring; values of less than 16 bits come from a codec, whose payloads can't be added on the way
and are gathered from all workers.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Prints the plan for the arguments of the command line.

    Args:
        args: what stands behind ``plan``; None: the process's own arguments.

    Raises:
        SystemExit: the arguments don't fit.
    """
    parser = _parser()
    given = parser.parse_args(args)
    try:
        print(printed(_rows(given), given.bandwidth_gbit_s))
    except ValueError as error:
        parser.error(str(error))


def printed(rows: Sequence[tuple[str, Plan]], bandwidth_gbit_s: float) -> str:
    """A header with the assumptions, and a table with a line per plan.

    Args:
        rows: name and plan of each; what the header says is taken from the first.
        bandwidth_gbit_s: of every link and direction.
    """
    plan = rows[0][1]
    link = f"{bandwidth_gbit_s:g} Gbit/s, {plan.latency_ms:g} ms"
    if plan.efficiency < 1:
        link += f"; transfers get {plan.efficiency:.1%} of the bandwidth"
    if plan.sync_overhead_s or plan.first_sync_overhead_s:
        link += f"; {plan.sync_overhead_s:g} s more per transfer, {plan.first_sync_overhead_s:g} s more for the first"
    table = [["", "bits", "pattern", "rounds", "GB sent", "seconds", "utilisation", *(f"{s:.0%}" for s in SHARES)]]
    for name, of_row in rows:
        cells = [name, f"{of_row.bits_per_value:g}", of_row.wire_pattern, f"{of_row.rounds:,}"]
        cells.append(f"{of_row.wire_bytes / 1e9:,.1f}")
        cells.append(f"{simulated_seconds(of_row, bandwidth_gbit_s):,.1f}")
        cells.append(f"{compute_utilisation(of_row, bandwidth_gbit_s):.1%}")
        table.append(cells + [_needed(share, of_row) for share in SHARES])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(x.ljust(w) if i < 3 else x.rjust(w) for i, (x, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in table
    ]
    needs = "Gbit/s for a utilisation of"
    return "\n".join(
        [
            f"{plan.parameters:,.0f} parameters, {plan.workers} workers, {plan.steps:,} local steps of"
            f" {plan.step_seconds:g} s, which take {plan.steps * plan.step_seconds:,.0f} s without communication",
            f"links: {link}",
            "",
            needs.rjust(len(lines[0])),
            *lines,
        ]
    )


def _needed(share: float, plan: Plan) -> str:
    try:
        return _three_digits(bandwidth_for(share, plan))
    except ValueError:  # latency and overheads alone keep the run from it
        return "never"


def _rows(given: argparse.Namespace) -> list[tuple[str, Plan]]:
    fragments = min(8, given.interval) if given.fragments is None else given.fragments
    overlap = min(1, given.interval - 1) if given.overlap is None else given.overlap
    diloco = Plan(
        parameters=given.parameters,
        step_seconds=given.step_seconds,
        steps=given.steps,
        workers=given.workers,
        latency_ms=given.latency_ms,
        interval=given.interval,
        bits_per_value=given.bits,
        pattern=given.pattern,
        efficiency=given.efficiency,
        sync_overhead_s=given.sync_overhead_s,
        first_sync_overhead_s=given.first_sync_overhead_s,
    )
    streaming = replace(diloco, fragments=fragments)
    overlapped = replace(streaming, overlap_steps=overlap)
    return [
        ("data parallel", replace(diloco, interval=1)),
        (f"DiLoCo, H = {given.interval}", diloco),
        (f"streaming, {fragments} fragments", streaming),
        (f"+ overlap of {overlap} step{'s' * (overlap != 1)}", overlapped),
        (f"+ {given.low_bits:g} bits", replace(overlapped, bits_per_value=given.low_bits)),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_diloco plan",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("the run").add_argument
    add("--parameters", type=float, required=True, metavar="N", help="of the model, such as 1e9")
    add("--step-seconds", type=float, required=True, metavar="S", help="seconds of a local step")
    add("--steps", type=_whole, default=10_000, metavar="N", help="local steps (default: 10000)")
    add("--workers", type=_whole, default=4, metavar="N", help="at least 2 (default: 4)")
    add("--interval", type=_whole, default=500, metavar="H", help="local steps per round (default: 500)")
    add("--bits", type=float, default=32, metavar="B", help="per value of dense transfers (default: 32)")
    add = parser.add_argument_group("streaming").add_argument
    add("--fragments", type=_whole, metavar="P", help="parts of the model, at most H (default: 8)")
    add("--overlap", type=_whole, metavar="TAU", help="steps during which a fragment may travel (default: 1)")
    add("--low-bits", type=float, default=4, metavar="B", help="per value of the last row (default: 4, as FP4)")
    add = parser.add_argument_group("links").add_argument
    add("--bandwidth-gbit-s", type=float, required=True, metavar="W", help="of each link and direction; 10^9 bits")
    add("--latency-ms", type=float, default=0.0, metavar="MS", help="of a hop (default: 0)")
    add("--pattern", choices=PATTERNS, help="of all rows (default: ring; all_gather for less than 16 bits)")
    add("--efficiency", type=float, default=1.0, metavar="E", help="fraction of the bandwidth in use (default: 1)")
    add("--sync-overhead-s", type=float, default=0.0, metavar="S", help="seconds more per transfer (default: 0)")
    add("--first-sync-overhead-s", type=float, default=0.0, metavar="S", help="once, for the first one (default: 0)")
    return parser


def _whole(text: str) -> int:
    """An integer, also as ``1e4``."""
    value = float(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(value)


def _three_digits(value: float) -> str:
    """At least three digits.

    >>> _three_digits(1234.5), _three_digits(12.345), _three_digits(0.012345)
    ('1,234', '12.3', '0.0123')
    """
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"
