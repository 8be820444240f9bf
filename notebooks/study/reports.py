"""How recorded tables are read, told as Markdown and drawn, whatever they are of."""

import pandas as pd

from . import tables
from .pictures import save_figure
from .rivals import CASE

NO_RESULTS = "No measurement is recorded yet."


def latest(table):
    """The rows of a table to show: of each GPU those of its last versions, H100s first; of rows of the same case the
    last, in the place of the first. Empty where nobody measured."""
    rows = tables.read(table)
    if rows.empty:
        return rows
    rows = rows.merge(rows.drop_duplicates("gpu", keep="last")[tables.SETTING], on=tables.SETTING)
    case = ["gpu", "rival", *CASE, *rows.columns.intersection(["cache", "layout"])]
    rows["place"] = rows.groupby(case, sort=False).ngroup()
    rows["order"] = rows.gpu.map(lambda gpu: ("H100" not in gpu, gpu))
    return rows.drop_duplicates("place", keep="last").sort_values(["order", "place"]).drop(columns=["order", "place"])


def groups(rows, columns):
    return rows.groupby(columns, sort=False) if len(rows) else ()


def told(table, tell):
    """The last run of a table on every GPU, as `tell` writes its rows: Markdown."""
    return "\n\n".join(f"{describe(rows)}:\n\n{tell(rows)}" for _, rows in groups(latest(table), "gpu")) or NO_RESULTS


def drawn(draw, *wanted):
    """The picture of the last run of some tables on every GPU; None where one of them is not recorded."""
    rows = [latest(table) for table in wanted]
    return draw(pd.concat(rows)) if all(map(len, rows)) else None


def show(name, draw, *wanted):
    """Draw the last run of some tables on every GPU, and keep the picture by name."""
    figure = drawn(draw, *wanted)
    save_figure(figure, name) if figure else print(NO_RESULTS)


def markdown(header, lines):
    """A table; numbers go to the right."""
    numeric = [all(str(line[i])[:1] in "0123456789-–" for line in lines) for i in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, rule, *lines])


def of_frame(frame):
    """A frame as a table, its index first: text as it is, of a number three digits or all before the point."""
    frame = frame.reset_index()
    lines = [[cell if isinstance(cell, str) else digits(cell) for cell in line] for line in frame.to_numpy(object)]
    return markdown(list(frame.columns), lines)


def share(floor, us):
    """The share of the floor's speed."""
    percent = 100 * floor / us
    return "–" if us != us else f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%" if percent >= 0.1 else "0.0%"


def digits(value):
    """Three digits, or all there are before the point."""
    return number(value, ",.0f" if abs(value) >= 100 else ".3g")


microseconds = digits  # a heading names the unit


def number(value, spec):
    """A number as text, or a dash where there is none."""
    return "–" if value != value else format(value, spec)


def describe(rows):
    """On what one GPU's rows were measured, or one CPU's, and when."""
    row, days, commits = rows.iloc[-1], sorted(set(rows.date)), list(dict.fromkeys(rows.commit))
    when = f"{' to '.join(dict.fromkeys([days[0], days[-1]]))}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    machine = row.gpu if row.gpu != "none" else f"{row.cpu}, {row.threads} threads"
    return f"{machine}, PyTorch {row.torch}, Triton {row.triton}, {when}"
