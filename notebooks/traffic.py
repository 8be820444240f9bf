"""What routing moves between ranks: bytes a token, when the package exchanges candidates, times on paper, pictures.

A rank has tokens of its own, finishes these, and owns a part of the columns or of the experts. Bytes are those that it
receives from other ranks for each of its own tokens; others receive as much from it.
"""

import bisect
from types import SimpleNamespace
from typing import NamedTuple

import many_gpus
import matplotlib.pyplot as plt
import numpy as np
import speed_study as speed
from matplotlib.patches import FancyArrowPatch, Rectangle
from routing_study import BLUE, GREEN, ORANGE, RED

from omni_kernels import sharded

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
    """Latency and bandwidth as the table many_gpus has them, of its last run; an example if it has none."""
    rows = rows[rows.case == many_gpus.LINKS] if len(rows) else rows
    if rows.empty:
        return EXAMPLE
    rows = rows[rows.gpu == rows.gpu.iloc[-1]].drop_duplicates("rival", keep="last").sort_values("megabytes")
    large = rows.iloc[-1]
    gbs = 1e3 * large.megabytes / large.us
    return Link(float(rows.us.iloc[0]), float(gbs), f"Measured, {speed.describe(rows)}")


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
    return speed.markdown(header, lines)


def owned_gigabytes(layer, num_ranks):
    """What a rank has of the experts, two vectors each."""
    return layer.num_expert_sqrt**2 * 2 * layer.hidden * 2 / num_ranks / 1e9


def _span(least, most):
    least, most = f"{least:.3g}", f"{most:.3g}"
    return least if least == most else f"{least} to {most}"


# --- pictures ---


def draw_shardings(layer):
    """Two ranks, what each has in the three ways of sharding, and what moves between them for a token."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.4))
    key_bytes, vector = 2 * layer.k * 4, layer.hidden * 2
    titles = {
        many_gpus.TOKENS: ("nothing, forward and backward",),
        many_gpus.FACTORS: (f"{2 * layer.k} keys each way,", f"{key_bytes} bytes"),
        many_gpus.EXPERTS: (f"its vector there, {vector} bytes,", f"an fp32 sum back, {2 * vector} bytes"),
    }
    for axes, (name, lines) in zip(panels, titles.items(), strict=True):
        axes.set(xlim=(0, 10), ylim=(0, 10), title=name)
        axes.axis("off")
        for rank, left in enumerate((0.3, 5.7)):
            axes.add_patch(Rectangle((left, 2.6), 4, 6.4, fill=False, edgecolor="0.5"))
            axes.text(left + 2, 9.2, f"rank {rank}", ha="center", fontsize=9)
            _DRAWN[name](axes, rank, left)
        if name != many_gpus.TOKENS:
            for height, way in ((2.15, "->"), (1.8, "<-")):
                axes.add_patch(
                    FancyArrowPatch((2.3, height), (7.7, height), arrowstyle=way, mutation_scale=12, color="0.3")
                )
        axes.text(5, 0.9, "\n".join(lines), ha="center", va="center", fontsize=10)
    return speed.finish(figure)


def _matrix(axes, left, bottom, rows, columns, colors, width=1.6, height=4.2):
    """Tokens by columns, of which some are this rank's: a color for each cell, None if it is not here."""
    for row in range(rows):
        for column in range(columns):
            place = (left + column * width / columns, bottom + (rows - 1 - row) * height / rows)
            color = colors(row, column)
            face = {"facecolor": color, "alpha": 0.75} if color else {"facecolor": "none"}
            axes.add_patch(Rectangle(place, width / columns, height / rows, edgecolor="0.7", linewidth=0.6, **face))


def _label(axes, left, first, second, below):
    for offset, text in ((1.05, first), (2.95, second)):
        axes.text(left + offset, 7.8, text, ha="center", fontsize=8)
    axes.text(left + 2, 2.8, below, ha="center", fontsize=8)


def _draw_tokens(axes, rank, left):
    for offset in (0.25, 2.15):
        _matrix(axes, left + offset, 3.4, 6, 6, lambda row, _: BLUE if row // 3 == rank else None)
    _label(axes, left, "logits x", "logits y", "half the tokens")


def _draw_factors(axes, rank, left):
    def color(row, column, shift):
        worst = (2 * row + shift + rank) % 3 + 3 * rank
        return None if column // 3 != rank else BLUE if column == worst else ORANGE

    for offset, shift in ((0.25, 0), (2.15, 1)):
        _matrix(axes, left + offset, 3.4, 6, 6, lambda row, column, shift=shift: color(row, column, shift))
    _label(axes, left, "logits x", "logits y", "half the columns; its k best")


def _draw_experts(axes, rank, left):
    chosen = {(0, 1), (1, 4), (3, 1), (4, 0), (4, 5)}  # by the orange token

    def color(row, column):
        return None if row // 3 != rank else ORANGE if (row, column) in chosen else GREEN

    _matrix(axes, left + 0.25, 3.4, 3, 1, lambda row, _: ORANGE if (rank, row) == (0, 1) else BLUE)
    _matrix(axes, left + 2.15, 3.4, 6, 6, color)
    _label(axes, left, "hidden", "N × N experts", "its tokens, half the experts")


_DRAWN = {many_gpus.TOKENS: _draw_tokens, many_gpus.FACTORS: _draw_factors, many_gpus.EXPERTS: _draw_experts}


def draw_break_even(num_expert_sqrt, k, ranks, ks):
    """Bytes a token against ranks, and from which N on the package exchanges."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    ranks = np.array(ranks)
    left.plot(ranks, exchanged(k, ranks), color=GREEN, marker="o", label=f"candidates, k = {k}")
    left.plot(ranks, gathered(num_expert_sqrt, ranks), color=ORANGE, marker="s", label=f"logits, N = {num_expert_sqrt}")
    chosen = [exchanged(k, r) if pays(num_expert_sqrt, k, r) else gathered(num_expert_sqrt, r) for r in ranks.tolist()]
    left.plot(ranks, chosen, color="black", linewidth=5, alpha=0.25, zorder=0, label="what the package does")
    left.set(xlabel="ranks", ylabel="bytes that a token receives (bf16)")
    for color, width in zip((BLUE, GREEN, ORANGE, RED), ks, strict=False):
        right.plot(ranks, [break_even(width, r) for r in ranks.tolist()], color=color, marker="o", label=f"k = {width}")
    right.set(xlabel="ranks", ylabel="least N that exchanges")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.legend(fontsize=8)
    return speed.finish(figure)


def draw_paper(layer, ranks):
    """Bytes a token against ranks, of all that may travel around a router."""
    figure, axes = plt.subplots(figsize=(8, 4.6))
    ranks = np.array(ranks)
    lines = {
        "dispatch + combine": (spread(layer.k, ranks, layer.hidden), GREEN, "o"),
        "logits gathered": (gathered(layer.num_expert_sqrt, ranks), ORANGE, "s"),
        "candidates exchanged": (exchanged(layer.k, ranks), BLUE, "^"),
    }
    for name, (num_bytes, color, marker) in lines.items():
        axes.plot(ranks, num_bytes / 1024, color=color, marker=marker, markersize=4, label=name)
    axes.axvline(RANKS_OF_HOST, color="0.6", linestyle=":", label="a host")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="ranks", ylabel="KiB that a token receives", title=f"N = {layer.num_expert_sqrt}, k = {layer.k}")
    axes.legend(fontsize=8)
    return speed.finish(figure)
