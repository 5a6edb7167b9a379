"""What a report and a paper show, as data: figures and tables built from a run's results."""
