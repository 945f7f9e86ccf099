"""Scores in, report out: the table (tables), the figure (figures), the page (html)."""

from branchmerge.report.html import report_folder, write_report

__all__ = ["report_folder", "write_report"]
