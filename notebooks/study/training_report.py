"""Notebook 04's tables and pictures of what training.py and learning.py have measured."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm

from . import tables
from .learning import DENSE
from .pictures import BLUE, GREEN, ORANGE, RED, save_figure
from .reports import NO_RESULTS, describe, markdown, microseconds, share
from .rivals import CASE
from .training import BACKWARDS, OURS, ROUTES

COLORS = dict(zip(BACKWARDS, (ORANGE, RED, BLUE, GREEN), strict=True))


def recorded(table, *keys):
    """The rows of a table on this GPU, or else on the one that was measured last, with the last versions; of rows with
    the same keys the last one. Rows that lack a key are of an older kind, and do not count."""
    rows = tables.read(table)
    rows = rows.dropna(subset=list(keys)) if {*keys} <= {*rows.columns} else rows.head(0)
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


def rung(name, predicted_us):
    """What arithmetic says of a rung that people read, and what it took where a run has timed it, as a sentence."""
    rows = recorded("backward_rungs", "rival", *CASE)
    found = rows[rows.rival == name] if len(rows) else rows
    said = f"{name}: by arithmetic {predicted_us:,.0f} µs; "
    if found.empty:
        return said + "not timed yet"
    row = found.iloc[-1]
    if isinstance(row.get("error"), str):  # a column only where something failed
        return f"{said}it failed: {row.error}"
    return f"{said}it took {microseconds(row.us)} µs on an {row.gpu}; its result: {row.check}"


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
    """A line for each rival, over all seeds."""
    lines = []
    for name, group in rows.groupby("rival", sort=False):
        losses = group.test_loss
        lines.append((
            name, group.steps.iloc[-1], len(group), f"{group.step_ms.median():.2f}",
            f"{group.peak_bytes.max() / 2**20:,.0f}", f"{group.parameters.iloc[-1]:,.0f}",
            f"{losses.mean():.4f} ({losses.min():.4f} to {losses.max():.4f})", f"{group.largest_difference.max():.2g}",
        ))  # fmt: skip
    return markdown(["layer", "steps", "seeds", "a step, ms", "peak memory, MiB", "parameters of the layers",
                     "loss on unseen text, nats a byte", "largest difference of a step's loss"], lines)  # fmt: skip


def curves_of(rows):
    """{rival: its losses, a row a step and a column a seed}; and those that have the same losses as the first."""
    curves = {name: run.pivot(index="step", columns="seed", values="loss") for name, run in
              rows.groupby("rival", sort=False)}  # fmt: skip
    first, *others = curves
    same = [name for name in others if curves[name].equals(curves[first])]
    return {name: curve for name, curve in curves.items() if name not in same}, same


def draw_training(rows):
    """Left the losses: means over the seeds in the band of all, and the seeds as thin lines. Right the experts that a
    batch of the first rival uses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    curves, same = curves_of(rows)
    for (name, curve), color in zip(curves.items(), (GREEN, RED, BLUE, ORANGE), strict=False):
        label = "\nthe same: ".join([name, *same]) if name == rows.rival.iloc[0] else name
        left.plot(curve.mean(axis=1), color=color, linewidth=2, label=label)
        left.plot(curve, color=color, linewidth=0.6)
        left.fill_between(curve.index, curve.min(axis=1), curve.max(axis=1), color=color, alpha=0.2)
    seeds = rows.seed.nunique()
    left.set(xlabel="training step", ylabel="loss, nats a byte", title=f"Loss, {seeds} seed{'s' * (seeds > 1)}")
    left.legend(fontsize=8)
    first = rows[rows.rival == rows.rival.iloc[0]]
    for column, color in zip([c for c in rows if c.startswith("experts_")], (BLUE, ORANGE), strict=False):
        counts = first.pivot(index="step", columns="seed", values=column)
        right.plot(counts.mean(axis=1), color=color, linewidth=2, label=f"layer {column[-1]}")
        right.plot(counts, color=color, linewidth=0.6)
    right.set(xlabel="training step", ylabel="experts used by a batch", title="Experts in use", ylim=(0, None))
    right.legend(fontsize=8)
    figure.tight_layout()
    return figure


def experts_in_use(rows):
    """How many experts the last recorded batch of the first rival used, in words."""
    first = rows[rows.rival == rows.rival.iloc[0]]
    last = first[first.step == first.step.max()]
    row, seeds = last.iloc[0], len(last)
    counts = [last[column].astype(int) for column in rows if column.startswith("experts_")]
    used = " and ".join(f"{span(count, ',')} in layer {layer}" for layer, count in enumerate(counts, start=1))
    return (f"Of {row.num_expert_sqrt**2:,.0f} experts, the batch of step {row.step:,} ({row.num_tokens:,.0f} tokens, "
            f"{row.k:.0f} experts each) used {used}, over {seeds} seed{'s' * (seeds > 1)}.")  # fmt: skip


def baseline(rows):
    """The first rival's loss on unseen text against that of the dense layer, seed by seed, in words."""
    losses = rows.pivot(index="seed", columns="rival", values="test_loss")
    gains = losses[DENSE] - losses[rows.rival.iloc[0]]
    parameters = rows.groupby("rival").parameters.last()
    times = parameters[rows.rival.iloc[0]] / parameters[DENSE]
    return (f"With {times:.3g} times the parameters of the dense layer, {rows.rival.iloc[0]} ends lower in "
            f"{(gains > 0).sum()} of {len(gains)} seeds, by {gains.mean():.3f} nats a byte on average "
            f"({span(gains, '.3f')}).")  # fmt: skip


def span(values, spec):
    """The smallest and the largest of some numbers as text, or the one that all are."""
    return " to ".join(dict.fromkeys(format(value, spec) for value in (values.min(), values.max())))


# --- pairs of runs ---


def pairs_table(rows):
    """A line a pair: by how much its runs differ in and after the last step."""
    lines = [(row.num_expert_sqrt, row.k, row.rival, "never" if np.isnan(row.apart) else f"{row.apart:.0f}",
              "none" if np.isnan(row.step) else f"{row.step:.0f}", f"{row.choices:,} of {row.made:,}",
              f"{row.loss_difference:.2g}", f"{row.weight_difference:.2g}") for row in rows.itertuples()]  # fmt: skip
    return markdown(["N", "k", "backward", "first step after which weights differ", "first step of another choice",
                     "other choices in the last step", "difference of its loss", "largest difference of a weight"],
                    lines)  # fmt: skip


def first_flips(rows):
    """Of each pair, in words: the first token that other experts were chosen for, or that there is none."""
    said = []
    for row in rows.itertuples():
        of = f"* **{row.rival}**, N = {row.num_expert_sqrt}, k = {row.k}: "
        if not np.isnan(row.step):
            where = f"in step {row.step:.0f}, layer {row.layer:.0f}, token {row.token:.0f} runs expert"
            said.append(f"{of}{where} {row.expert:.0f} in the one run, and expert {row.instead:.0f} in the other.")
        elif np.isnan(row.apart):
            said.append(f"{of}no weight differs after any of {row.steps} steps.")
        else:
            said.append(f"{of}weights differ from step {row.apart:.0f} on, but in {row.steps} steps no choice does.")
    return "\n".join(said)


def draw_pairs(rows):
    """The largest difference of a weight between the two runs of a pair, step by step, a panel a size. Zero is at the
    bottom; a dot is the first step in which some token chose another expert."""
    sizes = list(rows.groupby(CASE, sort=False))
    figure, panels = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 3.8), sharey=True, squeeze=False)
    for axes, (case, group) in zip(panels[0], sizes, strict=True):
        for name, run in group.groupby("rival", sort=False):
            wide = {"linewidth": 6, "zorder": 2} if name == OURS else {"linewidth": 1.8, "zorder": 3}  # zeros on zeros
            axes.plot(run.step, run.weight_difference, color=COLORS[name], label=name, clip_on=False, **wide)
            flipped = run[run.choices > 0].head(1)
            axes.plot(
                flipped.step, flipped.weight_difference, "o", color=COLORS[name], markeredgecolor="black", zorder=4
            )
        axes.set_yscale("symlog", linthresh=1e-9)
        axes.set(xlabel="training step", title=f"N = {case[1]}, k = {case[2]}", ylim=(0, None))
    panels[0][0].set_ylabel("largest difference of a weight")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    return figure
