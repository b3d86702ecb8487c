"""How a mean crosses the links: bytes and seconds of a collective among n workers.

Owns the formulas. With a payload of S bytes per participant in one direction (the ledger's ``nbytes``):

===========  ======================================  =====================  ==========================================
pattern      each worker sends (and receives)        hops one after other   used for
===========  ======================================  =====================  ==========================================
ring         2(n−1)/n · S                            2(n−1)                 dense means: reduce-scatter and all-gather
all_gather   (n−1) · S                               n−1                    coded payloads, which can't be added
pairs        S                                       1                      groups of two (gossip)
server       S up, then S down                       1 up, 1 down           a parameter server
===========  ======================================  =====================  ==========================================

seconds = bytes · 8 / (bandwidth in Gbit/s · 10⁹) + hops · latency. 2503.09799, Appendix A, counts the latency of an
all-reduce once (ε); here each of a ring's 2(n−1) steps waits for the hop before it, so that ε = 2(n−1) · latency. A
single worker has nobody to send to: 0 bytes, except to a server.
"""

from typing import Literal, get_args

Pattern = Literal["ring", "server", "all_gather", "pairs"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)


def default_pattern(coded: bool, group_size: int | None = None) -> Pattern:
    """The pattern for a kind of transfer.

    Args:
        coded: whether packed payloads cross, which can't be added on the way.
        group_size: workers of the largest group, if means are taken within groups; None: over all participants.
    """
    if group_size is not None and group_size <= 2:
        return "pairs"
    return "all_gather" if coded else "ring"


def sent_bytes(pattern: Pattern, nbytes: float, workers: int) -> float:
    """Bytes that each worker sends, and as many that it receives.

    >>> sent_bytes("ring", 1000, 4), sent_bytes("all_gather", 1000, 4), sent_bytes("pairs", 1000, 2)
    (1500.0, 3000.0, 1000.0)

    Args:
        pattern: one of :data:`PATTERNS`.
        nbytes: payload of each participant, in one direction.
        workers: participants, ≥ 1; in pairs at most 2.

    Raises:
        ValueError: there is no such pattern, or more than two workers for "pairs".
    """
    _check(pattern, workers)
    if pattern == "server":
        return float(nbytes)
    factors = {"ring": 2 * (workers - 1) / workers, "all_gather": workers - 1, "pairs": workers - 1}
    return float(nbytes) * factors[pattern]


def hops(pattern: Pattern, workers: int) -> int:
    """Hops one after the other, each of which costs the latency once; of a server in one direction.

    >>> hops("ring", 4), hops("all_gather", 4), hops("pairs", 2), hops("server", 4)
    (6, 3, 1, 1)
    """
    _check(pattern, workers)
    return {"ring": 2 * (workers - 1), "all_gather": workers - 1, "pairs": workers - 1, "server": 1}[pattern]


def link_seconds(nbytes: float, gbit_s: float, latency_ms: float, hops: int = 1) -> float:
    """Seconds for ``nbytes`` over a link with ``hops`` times its latency; Gbit is 10⁹ bits.

    >>> link_seconds(125_000_000, gbit_s=1, latency_ms=20)
    1.02
    """
    return nbytes * 8 / (gbit_s * 1e9) + hops * latency_ms / 1e3


def seconds(pattern: Pattern, nbytes: float, workers: int, gbit_s: float, latency_ms: float) -> float:
    """Seconds of a collective over equal links.

    >>> seconds("ring", 125_000_000, 4, gbit_s=1, latency_ms=0), seconds("server", 125_000_000, 4, 1, 0)
    (1.5, 2.0)

    Args:
        pattern: one of :data:`PATTERNS`.
        nbytes: payload of each participant, in one direction.
        workers: participants, ≥ 1; in pairs at most 2.
        gbit_s: bandwidth of each link and direction.
        latency_ms: of one hop.
    """
    one_way = link_seconds(sent_bytes(pattern, nbytes, workers), gbit_s, latency_ms, hops(pattern, workers))
    return 2 * one_way if pattern == "server" else one_way


def _check(pattern: Pattern, workers: int) -> None:
    if pattern not in PATTERNS:
        raise ValueError(f"`pattern` (={pattern!r}) must be one of {', '.join(map(repr, PATTERNS))}.")
    if workers < 1:
        raise ValueError(f"A transfer has {workers} workers; it must have one at least.")
    if pattern == "pairs" and workers > 2:
        raise ValueError(
            f"`pattern` is 'pairs', but {workers} workers take part in one mean. Pairs need groups of two; for means"
            " over more workers use 'ring', 'server' or 'all_gather'."
        )
