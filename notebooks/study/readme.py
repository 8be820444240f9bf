"""README's results, filled from the recorded tables."""

from . import calls_report, layer_report, reports, speed_report
from .files import REPOSITORY, replacing

README = REPOSITORY / "README.md"
MARKS = "<!-- results: filled by notebooks/study --readme -->", "<!-- end of results -->"


def fill():
    text = with_results(README.read_text(encoding="utf-8"))
    with replacing(README) as partial:
        partial.write_text(text, encoding="utf-8")


def with_results(text):
    """README's text with the results in their place: for every GPU what omni_router takes in each case, what it takes
    inside its layer, what a call of it costs the host, and what came of the guide's expectations; for every CPU what a
    call takes there."""
    before, rest = text.split(MARKS[0])
    told = (
        reports.told("targets", speed_report.targets_table),
        reports.told("layer", layer_report.layer_table),
        reports.told("calls", calls_report.ratios_table),
        reports.told("cpu", calls_report.cpu_table),
        reports.told("guide", speed_report.guide_table),
    )
    told = [text for text in told if text != reports.NO_RESULTS] or [reports.NO_RESULTS]
    return "\n\n".join([before + MARKS[0], *told, MARKS[1] + rest.split(MARKS[1])[1]])
