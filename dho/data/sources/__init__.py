"""Sources by layout: what records a data set consists of, and nothing else. One file per layout of the catalogue."""

from dho.data.sources.base import Record, Source, open_source, source_class
from dho.data.sources.listing import SUFFIXES

__all__ = ["SUFFIXES", "Record", "Source", "open_source", "source_class"]
