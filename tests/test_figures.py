"""Every committed figure is what `python notebooks/study --draw` draws from the recorded tables and the code."""

import ast
import importlib
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from cases import run_python

pytest.importorskip("seaborn")
Image = pytest.importorskip("PIL.Image")
REPOSITORY = pathlib.Path(__file__).parents[1]
NOTEBOOKS = REPOSITORY / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
drawing, pictures, reports, speed_report, tables = (
    importlib.import_module(f"study.{name}") for name in ("drawing", "pictures", "reports", "speed_report", "tables")
)
COMMITTED = {path.stem: path for path in (REPOSITORY / "figures").glob("*.png")}

# Of a text that comes with Python, another with another Python; the last of a training, whose sums of floats hang
# on the CPU in their last bits.
OF_TEXT = {"score_grid", "staircase", "gradient", "stale_gradients"}
OF_A_TRAINING = {"stale_gradients"}

# Another Matplotlib or FreeType draws other letters, and so axes of another size. What has color then covers a
# rectangle whose sides differ by 3% at most, and there, seen in blocks, at most 10% of the color is elsewhere where
# there are dots or lines, and 2% where areas are filled (3.9 and 3.11, with FreeType 2.6 and 2.14). If times are up to
# a quarter off, it is 12% to 78%, and 5% to 10%.
BLOCK, SIDES, ELSEWHERE, ELSEWHERE_OF_AREAS = 24, 0.05, 0.11, 0.04
AREAS = 0.15  # of the rectangle that has color, from which on it is areas


def colors(path):
    """How much color each pixel has, in the rectangle that has any. Axes and letters have none."""
    image = np.asarray(Image.open(path).convert("RGB"), np.float32)
    found = image.max(2) - image.min(2)
    rows, columns = (np.flatnonzero((found > 40).any(axis)) for axis in (1, 0))
    return found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def in_blocks(found, shape):
    return np.asarray(Image.fromarray(found).resize(shape[::-1], Image.Resampling.BOX))


def alike(path, other):
    """Whether two pictures are of the same data, whatever Matplotlib has drawn them."""
    one, two = colors(path), colors(other)
    sides = [a / b for a, b in zip(one.shape, two.shape, strict=True)]
    shape = tuple(max(2, side // BLOCK) for side in one.shape)
    first, second = in_blocks(one, shape), in_blocks(two, shape)
    bound = ELSEWHERE_OF_AREAS if (one > 40).mean() > AREAS else ELSEWHERE
    elsewhere = np.abs(first - second).sum() / (first.sum() + second.sum())
    return max(abs(side - 1) for side in sides) <= SIDES and elsewhere <= bound


def same_pixels(path, other):
    first, second = (np.asarray(Image.open(found).convert("RGBA")) for found in (path, other))
    return first.shape == second.shape and bool((first == second).all())


def difference(name, drawn):
    """What is wrong with a committed figure, or nothing."""
    made_with, now = (Image.open(path).info for path in (COMMITTED[name], drawn))
    if name in OF_TEXT and made_with.get("Source") != now["Source"]:
        return None
    if made_with.get("Software") == now["Software"] and name not in OF_A_TRAINING:
        return None if same_pixels(COMMITTED[name], drawn) else "other pixels"
    return None if alike(COMMITTED[name], drawn) else "other data"


def test_every_committed_figure_is_what_is_drawn(tmp_path):
    """No figure is missing, none is left over, and each has the pixels, or with another Matplotlib the data."""
    run_python(str(NOTEBOOKS / "study"), "--draw", OMNI_FIGURES=str(tmp_path))
    drawn = {path.stem: path for path in tmp_path.glob("*.png")}
    assert drawn.keys() == COMMITTED.keys()
    wrong = {name: difference(name, path) for name, path in drawn.items()}
    assert {name: what for name, what in wrong.items() if what} == {}, "run notebooks/study --draw --update"


def test_other_data_are_another_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "FIGURES", tmp_path)
    monkeypatch.setattr(tables, "DATA", tables.RECORDED)
    for table, name, draw in (
        ("guide", "speed_guide", speed_report.draw_guide),
        ("against_size", "speed_size", speed_report.draw_size),
        ("ladder", "ladder", speed_report.draw_ladder),
    ):
        rows = reports.latest(table)
        pictures.write_figure(draw(rows), name)
        assert alike(COMMITTED[name], tmp_path / f"{name}.png")
        times = rows.us * np.random.default_rng(0).uniform(0.8, 1.25, len(rows))
        pictures.write_figure(draw(rows.assign(us=times)), name)
        assert not alike(COMMITTED[name], tmp_path / f"{name}.png")
        assert not same_pixels(COMMITTED[name], tmp_path / f"{name}.png")
        pictures.plt.close("all")


def kept(source):
    """The names that a cell keeps figures by."""
    for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        function = ast.unparse(call.func).split(".")[-1]
        if function == "show":
            yield from [keywords["name"].value] if "name" in keywords else []
            yield from [call.args[0].value] if isinstance(call.args[0], ast.Constant) else []
        elif function == "save_figure":
            yield call.args[1].value


def test_every_figure_that_is_shown_is_drawn():
    sources = {path.name: path.read_text(encoding="utf-8") for path in REPOSITORY.glob("*.md")}
    names = []
    for path in NOTEBOOKS.glob("*.ipynb"):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                names += kept("".join(cell["source"]))
            else:
                sources[f"{path.name}, {number}"] = "".join(cell["source"])
    linked = [name for text in sources.values() for name in re.findall(r"figures/(\w+)\.png", text)]
    assert {"staircase", "ladder"} <= set(linked)
    assert set(linked) - COMMITTED.keys() == set()
    on_other_gpus = {"autotune_here", "autotune_two_gpus"}
    assert sorted(names) == sorted(drawing.PICTURES.keys() - on_other_gpus)
