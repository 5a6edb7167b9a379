"""`python -m tracmod.cli`: the same as the `tracmod` command."""

from tracmod.cli import main

main()
