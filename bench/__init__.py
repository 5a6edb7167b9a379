"""Benchmarks (installed as tracmod.bench): each checks its result before it times it."""
