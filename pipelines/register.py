"""Stage `register`: add the student to the model registry as `candidate`. `dvc repro register`"""

from dho.stages import script

if __name__ == "__main__":
    script("register")
