"""Stage `pretrain`: train the stand-in teacher, unless a real one is set. `dvc repro pretrain`"""

from dho.stages import script

if __name__ == "__main__":
    script("pretrain")
