"""One script for each library that `bench_peers.py` compares, and the process that times it."""
