"""What a study shows for itself: ``report.html``, ``metrics.json``, a table for the terminal."""

from server.report.metrics import read_metrics, write_metrics
from server.report.page import write_report
from server.report.sentences import headline
from server.report.table import summary_table

__all__ = ["headline", "read_metrics", "summary_table", "write_metrics", "write_report"]
