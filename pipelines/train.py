"""Stage `train`: train the student under torchrun. `dvc repro train`"""

from dho.stages import script

if __name__ == "__main__":
    script("train")
