"""Scores in, report out: the table (tables), the figure (figures), the page (html)."""

from branchmerge.report.html import write_report

__all__ = ["write_report"]
