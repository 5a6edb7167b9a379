"""Benchmarks, installed as tracmod.bench. Each checks its result before it times it."""
