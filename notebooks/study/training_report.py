"""Notebook 04's tables and pictures of what training.py has measured."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm

from . import tables
from .pictures import BLUE, GREEN, ORANGE, RED, save_figure
from .reports import NO_RESULTS, describe, markdown, microseconds, share
from .rivals import CASE
from .training import BACKWARDS, OURS, ROUTES

COLORS = dict(zip(BACKWARDS, (ORANGE, RED, BLUE, GREEN), strict=True))


def recorded(table, *keys):
    """The rows of a table on this GPU, or else on the one that was measured last, with the last versions; of rows with
    the same keys the last one."""
    rows = tables.read(table)
    if len(rows):
        here = rows[rows.gpu == tables.setting()["gpu"]]
        last = here if len(here) else rows[rows.date == rows.date.max()]
        rows = rows.merge(last[tables.SETTING].tail(1), on=tables.SETTING).drop_duplicates(keys, keep="last")
    return rows


def tell(table, write, *keys):
    """A recorded table as Markdown, `write(rows)` under a line that says what it was measured on."""
    rows = recorded(table, *keys)
    return f"{describe(rows)}:\n\n{write(rows)}" if len(rows) else NO_RESULTS


def show(name, draw, table, *keys):
    """Draw a recorded table and keep the picture by name."""
    rows = recorded(table, *keys)
    save_figure(draw(rows), name) if len(rows) else print(NO_RESULTS)


# --- the backward kernels ---


def backward_table(rows):
    """Every case: the floor, the times, and ours as a share of the floor's speed."""
    lines = []
    for case, group in rows.groupby(CASE, sort=False):
        times, floor = group.set_index("rival").us, group.floor_us.iloc[0]
        check = group.set_index("rival").check[OURS]
        times_of = [microseconds(times[name]) for name in BACKWARDS]
        lines.append((*case, microseconds(floor), *times_of, share(floor, times[OURS]), check))
    header = ["tokens", "N", "k", "dtype", "floor, µs", *(f"{name}, µs" for name in BACKWARDS)]
    return markdown([*header, "of the floor's speed", "bits"], lines)


def draw_backward(rows):
    """The share of the floor's speed, a group of bars a case."""
    figure, axes = plt.subplots(figsize=(9.5, 4))
    labels = (
        rows[CASE].astype(str).agg(lambda c: f"{int(c.iloc[0]):,}\nN={c.iloc[1]} k={c.iloc[2]}\n{c.iloc[3]}", axis=1)
    )
    data = pd.DataFrame({"case": labels, "rival": rows.rival, "percent": 100 * rows.floor_us / rows.us})
    sns.barplot(data, x="case", y="percent", hue="rival", palette=COLORS, ax=axes)
    axes.axhline(100, color="black", linestyle="--", linewidth=1.2)
    axes.set(xlabel="", ylabel="% of the floor's speed", title=f"Backward, {rows.gpu.iloc[0]}", ylim=(0, 120))
    axes.legend(fontsize=8, title="", ncol=len(COLORS), loc="upper center")
    figure.tight_layout()
    return figure


# --- run after run ---


def repeats_table(rows):
    lines = [(row.rival, f"{row.numbers:,}", f"{row.moved:,}", f"{row.largest:.2g}") for row in rows.itertuples()]
    return markdown(["backward", "numbers", "moved between runs", "largest movement"], lines)


def draw_repeats(rows):
    """By how much each number moved between runs, a panel for each backward, on one scale; white: not at all."""
    names = list(dict.fromkeys(rows.rival))
    figure, panels = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.9), layout="constrained")
    moved = rows.spread[rows.spread > 0]
    scale = LogNorm(moved.min(), moved.max()) if len(moved) else LogNorm()
    for axes, name in zip(panels, names, strict=True):
        image = rows[rows.rival == name].pivot(index="token", columns="column", values="spread")
        image = np.ma.masked_equal(image.to_numpy(), 0)
        drawn = axes.imshow(image, cmap="rocket_r", norm=scale, aspect="auto", interpolation="nearest")
        axes.set(title=name, xlabel="column of the gradient", ylabel="token")
        axes.grid(False)
    figure.colorbar(drawn, ax=panels, label="largest − smallest of all runs")
    return figure


# --- which dtype to route in ---


def precision_table(rows):
    lines = [
        (row.num_expert_sqrt, row.k, row.rival, f"{100 * row.changed_tokens:.2g}%", f"{100 * row.changed_experts:.2g}%",
         f"{row.score_error:.2g}", f"{100 * row.grad_error:.2g}%")
        for row in rows.itertuples()
    ]  # fmt: skip
    return markdown(["N", "k", "routed in", "tokens whose experts change", "experts that change", "error of a score",
                     "error of the gradient"], lines)  # fmt: skip


def draw_precision(rows):
    """What rounding the logits costs: tokens whose experts change, and the error of the gradient. Fp32 scores change no
    experts, so the dtype of the logits alone has a bar at the left."""
    rows = rows[rows.rival != "fp32"]
    cases = list(rows.groupby(["num_expert_sqrt", "k"], sort=False))
    figure, panels = plt.subplots(1, 2, figsize=(9, 1.1 * len(cases) + 1.4), layout="constrained", sharey=True)
    looks = dict(
        zip(list(ROUTES)[1:], ((BLUE, 1, ""), (BLUE, 0.4, "//"), (ORANGE, 1, ""), (ORANGE, 0.4, "//")), strict=True)
    )
    rounded = [name for name in looks if not name.endswith("scores fp32")]
    for axes, column, names in zip(panels, ("changed_tokens", "grad_error"), (rounded, list(looks)), strict=True):
        height = 0.8 / len(names)
        for place, (_, group) in enumerate(cases):
            percent = 100 * group.set_index("rival")[column]
            for number, name in enumerate(names):
                color, alpha, hatch = looks[name]
                at = place - 0.4 + (number + 0.5) * height
                axes.barh(at, percent[name], height=0.9 * height, color=color, alpha=alpha, hatch=hatch,
                          edgecolor="white", label=None if place else name)  # fmt: skip
                axes.text(percent[name], at, f" {percent[name]:.2g}%", va="center", fontsize=9)
        axes.grid(False, axis="y")
        axes.margins(x=0.14)
    panels[0].set(title="Tokens whose experts change", xlabel="% of tokens")
    panels[1].set(title="Error of the gradient", xlabel="% of its size")
    panels[0].set_yticks(range(len(cases)), [f"N = {size}\nk = {k}" for (size, k), _ in cases])
    panels[0].invert_yaxis()
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, title="routed in", fontsize=9, ncols=4, loc="outside lower center", frameon=False)
    figure.suptitle(f"{rows.gpu.iloc[0]}, {rows.num_tokens.iloc[0]:,} tokens, fp32 logits rounded", x=0.02, ha="left",
                    weight="bold")  # fmt: skip
    return figure


# --- training ---


def training_table(rows):
    lines = [
        (row.rival, row.steps, f"{row.step_ms:.2f}", f"{row.peak_bytes / 2**20:,.0f}", f"{row.test_loss:.4f}",
         f"{row.largest_difference:.2g}")
        for row in rows.itertuples()
    ]  # fmt: skip
    return markdown(["router", "steps", "a step, ms", "peak memory, MiB", "loss on unseen text, nats a byte",
                     "largest difference of a step's loss"], lines)  # fmt: skip


def draw_training(rows):
    """Left the loss of every run, right the experts that a batch of the first run uses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    styles = zip(dict.fromkeys(rows.rival), (GREEN, RED, BLUE), ((), (4, 3), (1, 3)), (4, 1.8, 1.8), strict=False)
    for name, color, dashes, width in styles:
        run = rows[rows.rival == name]
        left.plot(run.step, run.loss, color=color, linewidth=width, dashes=dashes or (None, None), label=name)
    left.set(xlabel="training step", ylabel="loss, nats a byte", title="Loss")
    left.legend(fontsize=8)
    first = rows[rows.rival == rows.rival.iloc[0]]
    for column, color in zip([c for c in rows if c.startswith("experts_")], (BLUE, ORANGE), strict=False):
        right.plot(first.step, first[column], color=color, linewidth=2, label=f"layer {column[-1]}")
    right.set(xlabel="training step", ylabel="experts used by a batch", title="Experts in use", ylim=(0, None))
    right.legend(fontsize=8)
    figure.tight_layout()
    return figure
