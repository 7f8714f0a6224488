"""Stage `teach`: write the teacher store; DVC knows why it is out of date, so a store of something else is replaced (and that is said). `dvc repro teach`"""

from dho.cli import main

if __name__ == "__main__":
    main("teach", "--rebuild")
