"""Notebook 06's pictures of what routing moves between ranks (traffic.py)."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle

from . import many_gpus, pictures
from .pictures import BLUE, GREEN, ORANGE, RED
from .traffic import RANKS_OF_HOST, break_even, exchanged, gathered, pays, spread


def _fixed(layer):
    return f"N = {layer.num_expert_sqrt:,}, k = {layer.k}, hidden vectors of {layer.hidden:,}, bf16"


def draw_shardings(layer):
    """Two ranks, what each has in the three ways of sharding, and what moves between them for a token."""
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 4.2))
    figure.suptitle(_fixed(layer), x=0.02, ha="left", weight="bold")
    key_bytes, vector = 2 * layer.k * 4, layer.hidden * 2
    titles = {
        many_gpus.TOKENS: ("nothing,", "forward and backward"),
        many_gpus.FACTORS: (f"{2 * layer.k} keys each way,", f"{key_bytes} bytes"),
        many_gpus.EXPERTS: (f"its vector there, {vector} bytes,", f"an fp32 sum back, {2 * vector} bytes"),
    }
    for axes, (name, lines) in zip(panels, titles.items(), strict=True):
        axes.set(xlim=(0, 10), ylim=(0, 10), title=name)
        axes.axis("off")
        for rank, left in enumerate((0.2, 5.5)):
            axes.add_patch(Rectangle((left, 2.6), 4.3, 6.4, fill=False, edgecolor="0.5"))
            axes.text(left + 2.15, 9.2, f"rank {rank}", ha="center", fontsize=9)
            _DRAWN[name](axes, rank, left)
        if name != many_gpus.TOKENS:
            for height, way in ((2.15, "->"), (1.8, "<-")):
                axes.add_patch(
                    FancyArrowPatch((2.3, height), (7.7, height), arrowstyle=way, mutation_scale=12, color="0.3")
                )
        axes.text(5, 0.7, "\n".join(lines), ha="center", va="center", fontsize=9)
    return pictures.finish(figure)


def _matrix(axes, left, bottom, rows, columns, colors, width=1.7, height=3.8):
    """Tokens by columns, of which some are this rank's: a color for each cell, None if it is not here."""
    for row in range(rows):
        for column in range(columns):
            place = (left + column * width / columns, bottom + (rows - 1 - row) * height / rows)
            color = colors(row, column)
            face = {"facecolor": color, "alpha": 0.75} if color else {"facecolor": "none"}
            axes.add_patch(Rectangle(place, width / columns, height / rows, edgecolor="0.7", linewidth=0.6, **face))


def _label(axes, left, first, second, below):
    for offset, text in ((1.05, first), (3.15, second)):
        axes.text(left + offset, 7.85, text, ha="center", fontsize=8.5)
    axes.text(left + 2.15, 3.25, below, ha="center", va="center", fontsize=8.5)


def _draw_tokens(axes, rank, left):
    for offset in (0.25, 2.35):
        _matrix(axes, left + offset, 3.9, 6, 6, lambda row, _: BLUE if row // 3 == rank else None)
    _label(axes, left, "logits x", "logits y", "half the tokens")


def _draw_factors(axes, rank, left):
    def color(row, column, shift):
        worst = (2 * row + shift + rank) % 3 + 3 * rank
        return None if column // 3 != rank else BLUE if column == worst else ORANGE

    for offset, shift in ((0.25, 0), (2.35, 1)):
        _matrix(axes, left + offset, 3.9, 6, 6, lambda row, column, shift=shift: color(row, column, shift))
    _label(axes, left, "logits x", "logits y", "half the columns;\nits k best")


def _draw_experts(axes, rank, left):
    chosen = {(0, 1), (1, 4), (3, 1), (4, 0), (4, 5)}  # by the orange token

    def color(row, column):
        return None if row // 3 != rank else ORANGE if (row, column) in chosen else GREEN

    _matrix(axes, left + 0.25, 3.9, 3, 1, lambda row, _: ORANGE if (rank, row) == (0, 1) else BLUE)
    _matrix(axes, left + 2.35, 3.9, 6, 6, color)
    _label(axes, left, "hidden", "experts", "its tokens,\nhalf the experts")


_DRAWN = {many_gpus.TOKENS: _draw_tokens, many_gpus.FACTORS: _draw_factors, many_gpus.EXPERTS: _draw_experts}


def draw_break_even(num_expert_sqrt, k, ranks, ks):
    """Bytes a token against ranks, and from which N on the package exchanges."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2))
    ranks = np.array(ranks)
    left.plot(ranks, exchanged(k, ranks), color=GREEN, marker="o", label="candidates")
    left.plot(ranks, gathered(num_expert_sqrt, ranks), color=ORANGE, marker="s", label="logits")
    chosen = [exchanged(k, r) if pays(num_expert_sqrt, k, r) else gathered(num_expert_sqrt, r) for r in ranks.tolist()]
    left.plot(ranks, chosen, color="black", linewidth=5, alpha=0.25, zorder=0, label="what the package does")
    left.set(xlabel="ranks", ylabel="bytes that a token receives", title=f"N = {num_expert_sqrt}, k = {k}, bf16")
    for (color, marker), width in zip(((BLUE, "D"), (GREEN, "o"), (ORANGE, "s"), (RED, "v")), ks, strict=False):
        least = [break_even(width, r) for r in ranks.tolist()]
        right.plot(ranks, least, color=color, marker=marker, markersize=5, label=f"k = {width}")
    right.set(xlabel="ranks", ylabel="least N", title="From which N on it exchanges")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    return pictures.finish_labeled(figure)


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
    axes.axvline(RANKS_OF_HOST, color="0.4", linestyle=":", label="a host")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="ranks", ylabel="KiB that a token receives", title=_fixed(layer))
    return pictures.finish_labeled(figure)
