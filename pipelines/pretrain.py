"""Stage `pretrain`: train the stand-in teacher, unless a real one is set. `dvc repro pretrain`"""

from dho.cli import main

if __name__ == "__main__":
    main("pretrain")
