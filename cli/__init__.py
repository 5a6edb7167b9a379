"""The command line: installed as `tracmod.cli`."""
