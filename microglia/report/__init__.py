"""One self-contained page from records; reads what runs wrote and measures nothing."""

from microglia.report.page import check_page, page, write_report
from microglia.report.sources import Entry, Findings, Run, gather

__all__ = ["Entry", "Findings", "Run", "check_page", "gather", "page", "write_report"]
