"""Records in ArrayRecord files: written in a stream, and read by their numbers, however many there are."""

import collections
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

OPEN = 64  # files that are open at a time, each with an index in memory, which has an entry for every group of records


class Span(NamedTuple):
    """Some records of a file that follow one another."""

    path: Path
    first: int
    size: int


class Records:
    """The records of some spans, one behind another: `len`, and indexing from 0 up."""

    def __init__(self, spans: Sequence[Span]):
        self._spans = spans
        self._ends = np.cumsum([span.size for span in spans], dtype=np.int64)
        self._readers = collections.OrderedDict[Path, Any]()  # the one that was used last comes last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._spans else 0

    def __getitem__(self, number: int) -> bytes:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int] | np.ndarray) -> list[bytes]:
        """The records of these numbers."""
        asked, found = np.asarray(numbers, np.int64), [b""] * len(numbers)
        among = np.searchsorted(self._ends, asked, side="right")
        with self._lock:
            for n in np.unique(among).tolist():
                span, places = self._spans[n], np.flatnonzero(among == n)
                positions = asked[places] - (self._ends[n] - span.size) + span.first
                for place, record in zip(places, self._reader(span.path).read(positions.tolist()), strict=True):
                    found[place] = record
        return found

    def _reader(self, path: Path) -> Any:
        if path not in self._readers:
            if len(self._readers) == OPEN:
                self._readers.popitem(last=False)[1].close()
            options = "readahead_buffer_size:0,max_parallelism:0"
            self._readers[path] = array_record_module.ArrayRecordReader(
                str(path), options, file_reader_buffer_size=2**15
            )
        self._readers.move_to_end(path)
        return self._readers[path]


def write(path: Path, records: Iterable[bytes], group: int, limit: int = sys.maxsize) -> tuple[int, int]:
    """Write records up to about `limit` bytes; returns their number and their bytes.

    So many of a `group` are read together. They are not compressed, which would take several times as long as writing.
    """
    writer = array_record_module.ArrayRecordWriter(str(path), f"group_size:{group},uncompressed")
    count = size = 0
    try:
        for record in records:
            writer.write(record)
            count, size = count + 1, size + len(record)
            if size >= limit:
                break
    finally:
        writer.close()
    return count, size
