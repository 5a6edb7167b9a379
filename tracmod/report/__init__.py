"""The HTML report of a run folder."""

from tracmod.report.html.page import write_report

__all__ = ["write_report"]
