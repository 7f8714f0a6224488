"""Stage `fetch`: bring the raw files of the data set here and check them. `dvc repro fetch`"""

from dho.stages import script

if __name__ == "__main__":
    script("fetch")
