"""Stage `train`: train the student under torchrun. `dvc repro train`"""

from dho.cli import main

if __name__ == "__main__":
    main("train")
