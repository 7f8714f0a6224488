"""Stage `register`: add the student to the model registry as `candidate`. `dvc repro register`"""

from dho.cli import main

if __name__ == "__main__":
    main("register")
