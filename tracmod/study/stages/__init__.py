"""One module for each stage of a run."""
