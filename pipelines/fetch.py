"""Stage `fetch`: bring the raw files of the data set here and check them. `dvc repro fetch`"""

from dho.cli import main

if __name__ == "__main__":
    main("fetch")
