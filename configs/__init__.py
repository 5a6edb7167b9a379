"""Configurations that travel with the package (installed as tracmod.configs)."""
