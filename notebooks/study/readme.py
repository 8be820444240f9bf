"""README's results, filled from the recorded tables."""

from . import calls_report, layer_report, many_gpus_report, reports, speed_report
from .files import REPOSITORY, replacing

README = REPOSITORY / "README.md"
# What README shows when somebody opens it: a title, a recorded table, and how it is told.
FOLDED = [
    ("All sizes, with the corners", "targets", speed_report.targets_table),
    ("The router inside its layer, from logits to probabilities and back", "layer", layer_report.layer_table),
    ("What a call costs the host, beside PyTorch's own operators", "calls", calls_report.ratios_table),
    ("On two GPUs", "many_gpus", many_gpus_report.targets_table),
    ("Without a GPU", "cpu", calls_report.cpu_table),
    ("What an optimization guide expects of its kernels, and what came of it", "guide", speed_report.guide_table),
]
MARKS = "<!-- results: filled by notebooks/study --readme -->", "<!-- end of results -->"


def fill():
    text = with_results(README.read_text(encoding="utf-8"))
    with replacing(README) as partial:
        partial.write_text(text, encoding="utf-8")


def with_results(text):
    """README's text with the results in their place, those of every GPU and CPU."""
    before, rest = text.split(MARKS[0])
    parts = [reports.told("targets", speed_report.headline_table)]
    for title, table, tell in FOLDED:
        text = reports.told(table, tell)
        if text != reports.NO_RESULTS:
            parts.append(f"<details><summary>{title}</summary>\n\n{text}\n\n</details>")
    return "\n\n".join([before + MARKS[0], *parts, MARKS[1] + rest.split(MARKS[1])[1]])
