"""What routing moves between ranks: bytes a token, when the package exchanges candidates, times on paper.

A rank has tokens of its own, finishes these, and owns a part of the columns or of the experts. Bytes are those that it
receives from other ranks for each of its own tokens; others receive as much from it.
"""

import bisect
from types import SimpleNamespace
from typing import NamedTuple

from omni_kernels import sharded

from . import many_gpus, reports

RANKS_OF_HOST = 8
NETWORK_GBS = 50.0  # 400 Gb/s for each GPU, between hosts: assumed, as one host cannot measure it

# Collectives, one after the other. The first is always what ranks tell each other.
EXCHANGING, GATHERING = 2, 3  # keys; x and y
SPREADING = 6  # experts, hidden vectors, scores; and in combine refusals again, sums


class Layer(NamedTuple):
    """A layer in 16 bits, and how many tokens each rank has."""

    num_expert_sqrt: int
    k: int
    hidden: int
    num_tokens: int


class Link(NamedTuple):
    latency_us: float  # a message of no size
    gbs: float  # each way
    source: str


EXAMPLE = Link(20.0, 300.0, "An example, not measured")


# --- bytes ---


def pays(num_expert_sqrt, k, num_ranks):
    """Whether the package exchanges candidates. Its rule asks for a mesh and a shape alone."""
    mesh = SimpleNamespace(size=lambda dim: num_ranks)
    return sharded._pays(SimpleNamespace(device_mesh=mesh, shape=(1, num_expert_sqrt)), k, 0, [None])


def break_even(k, num_ranks):
    """The smallest N for which it does."""
    return bisect.bisect_left(range(1 << 30), True, key=lambda n: pays(n, k, num_ranks))


def exchanged(k, num_ranks, size=2):
    """Bytes of the candidates: k keys of each factor and rank, twice as wide as logits, which have `size` bytes."""
    return (num_ranks - 1) * 2 * k * 2 * size


def gathered(num_expert_sqrt, num_ranks, size=2):
    """Bytes of the others' logits."""
    return (num_ranks - 1) / num_ranks * 2 * num_expert_sqrt * size


def visited(k, num_ranks):
    """How many other ranks have experts of a token, on average, if any expert is as likely as another."""
    return (num_ranks - 1) * (1 - (1 - 1 / num_ranks) ** k)


def spread(k, num_ranks, hidden, size=2):
    """Bytes of `dispatch` and `combine`: a hidden vector for each rank visited, and one of fp32 back."""
    return visited(k, num_ranks) * hidden * (size + 4)


# --- on paper ---


def link_of(rows):
    """Latency and bandwidth of the first GPU in rows of the table many_gpus, in its last run; else an example."""
    rows = rows[rows.case == many_gpus.LINKS] if len(rows) else rows
    if rows.empty:
        return EXAMPLE
    rows = rows[rows.gpu == rows.gpu.iloc[0]].drop_duplicates("rival", keep="last").sort_values("megabytes")
    large = rows.iloc[-1]
    gbs = 1e3 * large.megabytes / large.us
    return Link(float(rows.us.iloc[0]), float(gbs), f"Measured, {reports.describe(rows)}")


def milliseconds(num_bytes, num_ranks, num_messages, link):
    """What a rank waits for bytes from all others alike: if these send all at once, and if one after the other. Those
    of other hosts come over the network, beside those of its own."""
    outside = max(0, num_ranks - RANKS_OF_HOST) / (num_ranks - 1)
    move = num_bytes / 1e6 * max((1 - outside) / link.gbs, outside / NETWORK_GBS)
    wait = num_messages * link.latency_us / 1e3
    return move + wait, move + wait * (num_ranks - 1)


def paper(layer, ranks, link):
    """Factors sharded over all ranks, or over those of a host; and experts owned, by all. Markdown."""
    lines = []
    for num_ranks in ranks:
        cells = [num_ranks]
        for over in (num_ranks, min(num_ranks, RANKS_OF_HOST)):
            exchanges = pays(layer.num_expert_sqrt, layer.k, over)
            num_bytes = exchanged(layer.k, over) if exchanges else gathered(layer.num_expert_sqrt, over)
            times = milliseconds(layer.num_tokens * num_bytes, over, EXCHANGING if exchanges else GATHERING, link)
            cells += [f"{num_bytes / 1024:.3g}, {'exchange' if exchanges else 'gather'}", _span(*times)]
        num_bytes = spread(layer.k, num_ranks, layer.hidden)
        times = milliseconds(layer.num_tokens * num_bytes, num_ranks, SPREADING, link)
        cells += [f"{num_bytes / 1024:.3g}", _span(*times), f"{owned_gigabytes(layer, num_ranks):,.3g}"]
        lines.append(cells)
    header = ["ranks", "factors over all: KiB a token", "ms", f"over {RANKS_OF_HOST} of a host: KiB a token", "ms",
              "dispatch + combine: KiB a token", "ms", "weights a rank, GB"]  # fmt: skip
    return reports.markdown(header, lines)


def owned_gigabytes(layer, num_ranks):
    """What a rank has of the experts, two vectors each."""
    return layer.num_expert_sqrt**2 * 2 * layer.hidden * 2 / num_ranks / 1e9


def _span(least, most):
    least, most = reports.digits(least), reports.digits(most)
    return least if least == most else f"{least} to {most}"
