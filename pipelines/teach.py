"""Stage `teach`: write the teacher store. `dvc repro teach`

DVC runs it because something changed, so a store of something else is replaced, and what differs is reported.
"""

from dho.stages import script

if __name__ == "__main__":
    script("teach", rebuild=True)
