"""Pictures and excerpts show what is there: the kernels' own networks, and the lines of a file."""

import importlib
import itertools
import pathlib
import sys

import pytest

pytest.importorskip("seaborn")
NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
pictures = importlib.import_module("study.ladder_pictures")
RUNG = NOTEBOOKS / "ladder" / "rung3_staircase.py"


def run(comparators, outputs, keys):
    keys = list(keys)
    for i, j in comparators:
        keys[i], keys[j] = max(keys[i], keys[j]), min(keys[i], keys[j])
    return [keys[wire] for wire in outputs]


def test_networks_do_what_their_names_say():
    """By the 0-1 principle (Knuth, TAOCP 3, 5.3.4) zeros and ones are enough."""
    for keys in itertools.product((0, 1), repeat=8):
        best = sorted(keys, reverse=True)
        assert run(*pictures.network_of("sort", 8), keys) == best
        lists = sorted(keys[:4], reverse=True) + sorted(keys[4:], reverse=True)
        assert run(*pictures.network_of("merge best", 8, 4), lists) == best[:4]
        assert run(*pictures.network_of("merge", 8, 4, 3), lists) == best[:3]


def test_comparators_of_a_step_share_no_wire():
    comparators, _ = pictures.network_of("sort", 16)
    steps = pictures.steps_of(comparators)
    assert max(steps) + 1 == 10
    for step in range(10):
        wires = [wire for pair, at in zip(comparators, steps, strict=True) if at == step for wire in pair]
        assert len(wires) == len(set(wires))


def test_every_comparator_is_drawn():
    figure = pictures.draw_network("sort", 16)
    drawn = [line.get_ydata() for line in figure.axes[0].lines if line.get_gid() == "comparator"]
    assert sorted(map(tuple, drawn)) == sorted(pictures.network_of("sort", 16)[0])
    pictures.plt.close(figure)


def test_every_register_is_drawn():
    figure = pictures.draw_owners(k=8, row_keys=64)
    assert [len(axes.patches) for axes in figure.axes] == [32 * 2, 32 * 8 + 2]
    pictures.plt.close(figure)


def test_an_excerpt_is_the_lines_of_the_file():
    lines = RUNG.read_text().splitlines()
    number = lines.index("def staircase(PLACES: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr):")  # from 0
    shown = pictures.excerpt(RUNG, "staircase").data.splitlines()
    assert shown[:3] == [f"`ladder/rung3_staircase.py`, line {number}", "", "```python"]
    assert shown[3:-1] == lines[number - 1 : number + 9]
    part = pictures.excerpt(importlib.import_module("ladder.rung3_staircase"), "staircase", 3, 4).data.splitlines()
    assert part[3:-1] == lines[number + 1 : number + 3]
    assert pictures.source_of(NOTEBOOKS / "ladder" / "rung4_packed_keys.py", "FREE")[0][0].startswith("FREE = {")


def test_an_excerpt_is_short_and_of_something():
    with pytest.raises(ValueError, match="at most 25 lines"):
        pictures.excerpt(RUNG, "staircase_kernel")
    with pytest.raises(ValueError, match=r"must be defined in .* got 'sort'"):
        pictures.excerpt(RUNG, "sort")
