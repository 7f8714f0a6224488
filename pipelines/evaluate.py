"""Stage `evaluate`: choose alpha and beta on val, measure, draw the plots. `dvc repro evaluate`"""

from dho.cli import main

if __name__ == "__main__":
    main("evaluate")
