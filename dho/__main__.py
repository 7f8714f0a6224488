"""`python -m dho` is the command `dho`."""

from dho.cli import main

main()
