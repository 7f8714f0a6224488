"""Stage `prepare`: check every image, draw the splits, write tar shards and the index. `dvc repro prepare`"""

from dho.stages import script

if __name__ == "__main__":
    script("prepare")
