"""The content of reports and papers as data: figures and tables built from a run's results."""
