"""Notebook 05's tables and pictures of what layer.py has measured."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from . import pictures, reports
from .layer import (
    ADAPTIVE,
    BACKWARD,
    BOTH,
    COMPARED,
    COMPILED,
    EAGER,
    EXP,
    GATES,
    GRAPH,
    LATER_ROUTER,
    LOG_SOFTMAX,
    MAIN,
    ONE_THREAD,
    OURS,
    PROMISED,
    ROUTER,
    TOP_P,
)
from .pictures import BLUE, GREEN, ORANGE, RED
from .reports import microseconds, number, share
from .rivals import CASE, Case

WAYS = {BOTH: "from Python", ONE_THREAD: "on one thread", GRAPH: "in a CUDA graph"}


def accuracy_table(rows):
    """Errors as multiples of 10⁻⁶."""
    columns = [*PROMISED, "log_error_absolute"]
    lines = [(number(row.scale, "g"), row.num_expert_sqrt, row.k, f"`{row.rival}`" if row.rival == OURS else row.rival,
              *(number(1e6 * getattr(row, column), ".2f") for column in columns))
             for row in rows.itertuples()]  # fmt: skip
    return reports.markdown(["logits' scale", "N", "k", "route", "largest error of a probability, of its value, 10⁻⁶",
                           "of a log-probability, of max(1, its size), 10⁻⁶", "the same, absolute, 10⁻⁶"],
                          lines)  # fmt: skip


def cards_table(rows):
    """What becomes of a kernel's time on a second GPU: of all whose machine code was the same there, and of PyTorch's
    own, how many times as fast it is, and how many times as fast that GPU copies."""
    gpus, lines = list(dict.fromkeys(rows.gpu))[:2], []
    rows = rows[(rows.method == "graph") & (rows.binary.notna() | rows.rival.isin([GATES, LOG_SOFTMAX, EXP]))]
    rows = rows[rows.gpu.isin(gpus)].fillna({"binary": ""})
    for _, group in rows.groupby(["rival", *CASE, "binary"], sort=False):
        if len(group) == 2:
            first, (us, other_us), (copy, other_copy) = group.iloc[0], group.us, group.bandwidth_gbs
            times = f"{us / other_us:.2f}", f"{other_copy / copy:.2f}"
            lines.append((first.rival, *_sizes(first), microseconds(us), microseconds(other_us), *times))
    header = ["kernel", "tokens", "N", *(f"{gpu}, µs" for gpu in gpus), "times as fast", "a copy"]
    return reports.markdown(header, lines)


def _times_of_cases(rows):
    """Every case of one GPU with the times of all that was measured in it, NaN of what failed."""
    for case, group in rows.groupby(CASE, sort=False):
        times = group.set_index("rival").us
        yield Case(*case), lambda name, times=times: times.get(name, np.nan), group.set_index("rival").floor_us


def _sizes(case):
    return f"{case.num_tokens:,}", case.num_expert_sqrt


def _head(rows):
    return [f"tokens (k = {rows.k.iloc[0]}, {rows.dtype.iloc[0]})", "N"]


def forward_table(rows):
    lines = []
    for case, us, floor in _times_of_cases(rows):
        lines.append((*_sizes(case), *map(microseconds, (floor[OURS], us(ROUTER), us(OURS))),
                      number(us(OURS) / us(ROUTER), ".2f"), *map(microseconds, (us(EAGER), us(COMPILED), us(ADAPTIVE))),
                      number(us(ADAPTIVE) / us(OURS), ".2f")))  # fmt: skip
    return reports.markdown([*_head(rows), "floor, µs", "router alone, µs", f"`{OURS}`, µs", "over the router",
                           f"{EAGER}, µs", "compiled, µs", f"`adaptive_router`, top_p = {TOP_P}, µs",
                           f"over `{OURS}`"], lines)  # fmt: skip


def backward_table(rows):
    lines = [(*_sizes(case), microseconds(floor[BACKWARD]), microseconds(us(BACKWARD)),
              share(floor[BACKWARD], us(BACKWARD)))
             for case, us, floor in _times_of_cases(rows)]  # fmt: skip
    return reports.markdown([*_head(rows), "floor, µs", f"backward of `{OURS}`, µs", "of the floor's speed"], lines)


def steps_table(rows):
    """Every case in every way to run both passes that is on record."""
    lines = []
    for case, us, _ in _times_of_cases(rows):
        for how, told in WAYS.items():
            ours, eager, compiled = (us(f"{name}, {how}") for name in COMPARED)
            if not np.isnan(ours):
                lines.append((*_sizes(case), told, *map(microseconds, (ours, eager, compiled)),
                              number(ours / eager, ".2f"), number(ours / compiled, ".2f")))  # fmt: skip
    return reports.markdown([*_head(rows), "forward + backward", f"`{OURS}`, µs", f"{EAGER}, µs", "compiled, µs",
                           "ours over eager", "ours over compiled"], lines)  # fmt: skip


def layer_table(rows):
    """The short one, for README."""
    lines = []
    for case, us, _ in _times_of_cases(rows):
        steps = [us(f"{name}, {BOTH}") for name in COMPARED]
        lines.append((*_sizes(case), *map(microseconds, (us(ROUTER), us(OURS), us(EAGER), us(COMPILED), *steps)),
                      number(steps[0] / steps[2], ".2f"),
                      number(us(f"{OURS}, {GRAPH}") / us(f"{COMPILED}, {GRAPH}"), ".2f")))  # fmt: skip
    return reports.markdown([*_head(rows), "router alone, µs", f"`{OURS}`, µs", f"{EAGER}, µs", "compiled, µs",
                           f"forward + backward of `{OURS}`, µs", f"of {EAGER}, µs", "compiled, µs",
                           "ours over compiled", "the same in a CUDA graph"], lines)  # fmt: skip


def adaptive_table(rows):
    lines = [(row.rival, f"{row.value:g}", f"{row.experts:.2f}", f"{row.loss:.4f}") for row in rows.itertuples()]
    return reports.markdown(["rule", "its number", "experts a token, mean", "loss, nats a byte"], lines)


# --- pictures ---

STACKS = {
    "before": [GATES, LOG_SOFTMAX, LATER_ROUTER, EXP],
    "before,\ncompiled": [GATES, COMPILED],
    "after": [GATES, OURS],
}
COLORS = {GATES: "0.75", LOG_SOFTMAX: ORANGE, LATER_ROUTER: BLUE, EXP: RED, COMPILED: sns.light_palette(ORANGE)[3],
          OURS: GREEN}  # fmt: skip
HATCHES = {GATES: "", LOG_SOFTMAX: "//", LATER_ROUTER: "", EXP: "\\\\", COMPILED: "..", OURS: "xx"}


def draw_layer(rows):
    """What a layer takes from hidden states to weights and experts, before and after: a row of panels for every GPU, a
    panel for every N."""
    rows = rows[rows.num_tokens == MAIN.num_tokens]
    groups = list(rows.groupby(["gpu", "num_expert_sqrt"], sort=False))
    columns = rows.num_expert_sqrt.nunique()
    height = len(groups) // columns
    figure, panels = plt.subplots(height, columns, figsize=(5.4 * columns, 2.9 * height), squeeze=False)
    for axes, (_, group) in zip(panels.flat, groups, strict=True):
        times, labeled = group.set_index("rival").us, set()
        for place, names in enumerate(STACKS.values()):
            ends = np.cumsum([times[name] for name in names])
            for name, end in zip(names, ends, strict=True):
                label = None if name in labeled else name
                axes.barh(place, times[name], left=end - times[name], color=COLORS[name], height=0.7, label=label,
                          hatch=HATCHES[name], edgecolor="white")  # fmt: skip
                labeled.add(name)
            axes.text(ends[-1], place, f" {microseconds(ends[-1])}", va="center", fontsize=9)
        axes.set_yticks(range(len(STACKS)), STACKS)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.12)
        axes.set(xlabel="µs of kernels, forward", title=pictures.fixed(group))
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, 0))
    return pictures.finish(figure)


def draw_adaptive(rows):
    """Loss on unseen text against the experts that a token runs: fixed k, and as many as it needs."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for (name, group), (color, marker) in zip(
        rows.groupby("rival", sort=False), ((ORANGE, "s"), (BLUE, "^"), (RED, "v"), (GREEN, "o")), strict=False
    ):
        axes.plot(group.experts, group.loss, color=color, marker=marker, label=name)
        for row in group.itertuples():
            axes.annotate(f"{row.value:g}", (row.experts, row.loss), (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="experts a token runs in a layer, mean", ylabel="loss on unseen text, nats a byte",
             title=pictures.fixed(rows))  # fmt: skip
    axes.legend()
    return pictures.finish(figure)


def draw_text(rows):
    """How many experts each byte of a stretch of text runs, a row of bars for every layer."""
    layers = rows.groupby("layer", sort=False)
    figure, panels = plt.subplots(len(layers), 1, figsize=(11, 1.9 * len(layers)), sharex=True, squeeze=False)
    for axes, (layer, group) in zip(panels[:, 0], layers, strict=True):
        axes.bar(group.position, group.experts, color=GREEN, width=0.8)
        axes.set(ylabel="experts", title=f"layer {layer}", xlim=(-1, len(group)))
        letters = [{32: "␣", 10: "↵"}.get(byte, chr(byte)) for byte in group.byte]
        axes.set_xticks(group.position, letters, family="monospace", fontsize=8)
        axes.grid(False, axis="x")
    return pictures.finish(figure)
