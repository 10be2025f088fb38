"""Images of a data set before they are read: where each is, and its class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class ImageReader(Protocol):
    """Where the images are. An entry is whatever names one image: a path, a place in a shard, a row."""

    def name(self, entry: Any) -> str:
        """What messages call the image."""
        ...

    def content(self, entry: Any) -> Path | bytes:
        """A file, or its content."""
        ...


@dataclass(frozen=True)
class LabelledEntries:
    """Images of one split, each with its class: labels (N,) int64."""

    reader: ImageReader
    entries: Sequence[Any]
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> "LabelledEntries":
        return replace(self, entries=[self.entries[index] for index in indices], labels=self.labels[indices])


@dataclass(frozen=True)
class FileReader:
    """Files below one folder; an entry is the path from there."""

    folder: Path

    def name(self, entry: str) -> str:
        return str(self.folder / entry)

    def content(self, entry: str) -> Path:
        return self.folder / entry
