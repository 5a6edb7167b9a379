"""Names, number formats and sentences of the report."""
