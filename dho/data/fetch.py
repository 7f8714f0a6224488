"""Stage `fetch`: bring a data set's raw files to one folder, by whichever way works, and prove that they are right.

    dho fetch

Tried in order: `data.source` on this machine, the data set's home page, Debian's package. Every way ends in the same
bytes: the SHA-256 of each uncompressed file is in the catalogue. A user's own images are not copied: they stay where
they are, and the folder that this stage writes lists them (`listing.csv`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from dho.catalogue.datasets import DataSet
from dho.config import Config
from dho.core.errors import DataError
from dho.core.workspace import Workspace
from dho.data.dataset import data_set
from dho.data.download import is_right, ways
from dho.data.sources import source_class


def fetch(config: Config, workspace: Workspace) -> None:
    """Put the raw files of the data set into `workspace.raw`; files that are already there and right are kept.

    Raises:
        DataError: no way worked (says what to put where), or the user's images cannot be listed.
    """
    data, out = config.data, workspace.raw
    out.mkdir(parents=True, exist_ok=True)
    _bring_files(data_set(data), data.source, out)
    source_class(data).list_images(data, out)


def _bring_files(row: DataSet, source: str | None, out: Path) -> None:
    missing = {name: sha256 for name, sha256 in row.files.items() if not is_right(out / name, sha256)}
    if not missing:
        return
    failures = []
    for way, attempt in ways(row, source):
        try:
            attempt(out, missing)
        except Exception as error:  # whatever goes wrong on one way, the next one is tried and the reason is reported
            failures.append(f"{way}: {error}")
            print(f"fetch: {way} did not work ({error}); trying the next way", file=sys.stderr)
            continue
        print(f"fetch: {len(missing)} files of {row.name} from {way}")
        return
    raise DataError(
        f"{row.name} could not be fetched ({'; '.join(failures)}). "
        f"Put {', '.join(f'{name}.gz' for name in row.files)} "
        f"into {source or 'a folder'} and {'run again' if source else 'set data.source to it'}"
    )
