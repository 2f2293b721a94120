"""`python -m transload` is the command line."""

from transload.cli import main

main()
