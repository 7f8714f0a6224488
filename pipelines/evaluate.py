"""Stage `evaluate`: choose alpha and beta on val, measure, draw the plots. `dvc repro evaluate`"""

from dho.stages import script

if __name__ == "__main__":
    script("evaluate")
