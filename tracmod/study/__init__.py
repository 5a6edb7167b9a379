"""The study of a run folder, stage by stage."""
