"""Stage `prepare`: check every image, draw the splits, write tar shards and the index. `dvc repro prepare`"""

from dho.cli import main

if __name__ == "__main__":
    main("prepare")
