"""The pictures of notebook 01: what a token is scored, where its winners are, where gradients go."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from omni_kernels import brute_force_router

from .pictures import BLUE, ORANGE, RED, SCORES
from .rivals import DTYPES

WINNER = {"fill": False, "edgecolor": ORANGE, "linewidth": 2.2}


def draw_score_grid(x, y, k, letter):
    """The N x N scores of a letter's token between the two vectors they are sums of; the k winners numbered, best
    first."""
    figure, grid, left, top = _grid_with_margins()
    _draw_winners(grid, x, y, k)
    _draw_margins(left, top, x.exp(), y.exp(), "exp(x)", "exp(y)")
    heading = (
        f"One token: {len(x) ** 2} experts, and the {k} that “{letter}” is sent to\nN = {len(x)}, k = {k}, {_dtype(x)}"
    )
    figure.suptitle(heading, x=0.12, y=0.97, ha="left", weight="bold")
    return figure


def draw_staircase(x, y, k):
    """The same scores twice: as the experts are numbered, and with rows and columns sorted, best first."""
    figure, (plain, ordered) = plt.subplots(1, 2, figsize=(9, 5.2))
    _draw_winners(plain, x, y, k)
    _draw_winners(ordered, x.sort(descending=True).values, y.sort(descending=True).values, k)
    size = len(x)
    reach = [min(k // rank, size) for rank in range(1, size + 1)] + [0]
    ordered.stairs(reach, np.arange(size + 2), orientation="horizontal", color=RED, linewidth=2.5, baseline=None)
    ordered.plot([reach[0]] * 2, [0, 1], color=RED, linewidth=2.5)
    plain.set(title=f"{size**2} experts, the {k} best marked", xlabel="column j", ylabel="row i")
    ordered.set(
        title=f"sorted: {sum(reach)} candidates, a·b ≤ {k}", xlabel="rank b of the column", ylabel="rank a of the row"
    )
    ticks = np.arange(0, size, 3)
    for axis in (ordered.xaxis, ordered.yaxis):
        axis.set_ticks(ticks + 0.5, ticks + 1)
    figure.suptitle(f"One token, N = {size}, k = {k}, {_dtype(x)}", x=0.02, ha="left", weight="bold")
    figure.tight_layout()
    return figure


def draw_ties(x, y, k):
    """Scores of few distinct values, each written in its cell, and the order in which the winners are taken."""
    figure, (scores, winners) = plt.subplots(1, 2, figsize=(9, 4.6))
    sums = (x[:, None] + y[None, :]).numpy()
    sns.heatmap(sums, ax=scores, cmap=SCORES, cbar=False, square=True, annot=True, fmt="g", linewidths=0.5)
    _draw_winners(winners, x, y, k)
    scores.set(title="score of each expert", xlabel="column j", ylabel="row i")
    scores.tick_params(axis="y", labelrotation=0)
    winners.set(title=f"rank of the {k} winners", xlabel="column j", ylabel="row i")
    figure.suptitle(f"One token, N = {len(x)}, k = {k}, {_dtype(x)}", x=0.02, ha="left", weight="bold")
    figure.tight_layout()
    return figure


def draw_gradient(rows, columns, weights, num_expert_sqrt):
    """The gradient each winner gets, where it sits in the grid, and the sums that reach the two vectors."""
    figure, grid, left, top = _grid_with_margins()
    cells = np.zeros((num_expert_sqrt, num_expert_sqrt))
    cells[rows, columns] = weights
    names = [[f"{cell:.2f}" if cell else "" for cell in row] for row in cells]
    heatmap = {"cmap": SCORES, "cbar": False, "linewidths": 0.5, "annot_kws": {"size": 8}}
    sns.heatmap(cells, ax=grid, annot=names, fmt="", **heatmap)
    for row, column in zip(rows, columns, strict=True):
        grid.add_patch(Rectangle((column, row), 1, 1, **WINNER))
    grid.set(xlabel="column j")
    _draw_margins(left, top, cells.sum(1), cells.sum(0), "gradient of x", "gradient of y")
    figure.suptitle("Gradients of the scores, and where they go", x=0.12, y=0.95, ha="left", weight="bold")
    return figure


def draw_losses(losses):
    """Loss curves, {name: one loss a step}, smoothed over ten steps and labelled where they end."""
    figure, axes = plt.subplots(figsize=(8, 3.8))
    for (name, values), color, line in zip(losses.items(), (BLUE, RED), ("-", "--"), strict=True):
        smooth = np.convolve(values, np.ones(10) / 10, mode="valid")
        axes.plot(np.arange(9, len(values)), smooth, color=color, linestyle=line, linewidth=2)
        axes.annotate(
            name, (len(values), smooth[-1]), xytext=(4, 0), textcoords="offset points", color=color, va="center"
        )
    axes.set(
        xlabel="training step",
        ylabel="loss (nats a byte)",
        title="Next-byte prediction, 256 tokens a step, N = 16, k = 8, fp32, on a CPU",
    )
    sns.despine(ax=axes)
    figure.tight_layout()
    return figure


def _dtype(tensor):
    return next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)


def _grid_with_margins():
    figure = plt.figure(figsize=(6.4, 6.4))
    layout = figure.add_gridspec(2, 2, width_ratios=(1, 5), height_ratios=(1, 5), wspace=0.04, hspace=0.04)
    grid = figure.add_subplot(layout[1, 1])
    return figure, grid, figure.add_subplot(layout[1, 0], sharey=grid), figure.add_subplot(layout[0, 1], sharex=grid)


def _draw_winners(axes, x, y, k):
    """The heatmap of a token's scores, its k winners framed and numbered by the definition."""
    indices = brute_force_router(x[None], y[None], k)[1][0].tolist()
    sns.heatmap((x[:, None] + y[None, :]).float().numpy(), ax=axes, cmap=SCORES, cbar=False, square=True)
    for rank, expert in enumerate(indices, start=1):
        row, column = divmod(expert, len(x))
        axes.add_patch(Rectangle((column, row), 1, 1, **WINNER))
        axes.text(
            column + 0.5, row + 0.5, str(rank), ha="center", va="center", fontsize=9, weight="bold", color="white"
        )
    axes.set(xlabel="column j")
    axes.tick_params(labelrotation=0, labelsize=9)


def _draw_margins(left, top, rows, columns, row_name, column_name):
    centres = np.arange(len(rows)) + 0.5
    left.barh(centres, rows, color=BLUE, height=0.8)
    top.bar(centres, columns, color=BLUE, width=0.8)
    left.invert_xaxis()
    left.set(xlabel=row_name, ylabel="row i")
    top.set_ylabel(column_name, rotation=0, ha="right", va="center", labelpad=8)
    for axes in (left, top):
        axes.grid(False)
        value_axis = axes.xaxis if axes is left else axes.yaxis
        value_axis.set_major_locator(MaxNLocator(2))
        value_axis.set_major_formatter("{x:g}")
        sns.despine(ax=axes, left=axes is left, bottom=axes is top)
    left.tick_params(axis="y", labelrotation=0)
    top.tick_params(axis="x", labelbottom=False)
