"""What a study shows for itself: ``report.html``, ``metrics.json``, a table for the terminal."""

from fedward_server.report.metrics import read_metrics, write_metrics
from fedward_server.report.page import write_report
from fedward_server.report.summary import headline
from fedward_server.report.table import summary_table

__all__ = ["headline", "read_metrics", "summary_table", "write_metrics", "write_report"]
