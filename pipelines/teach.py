"""Stage `teach`: write the teacher store. `dvc repro teach`

DVC runs it because something changed, so a store of something else is replaced, and what differs is said.
"""

from dho.cli import main

if __name__ == "__main__":
    main("teach", "--rebuild")
