"""Random access to the shards of a webdataset: which sample's files lie where in which tar, found once.

The webdataset package streams; here a sample must be a function of (index, epoch). The layout is its own
(webdataset.github.io): files of one sample follow each other in a shard and are called alike up to the first dot.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from snell_scale.data.images import printable

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_OPEN_SHARDS = 64


class TarMember(NamedTuple):
    """A file in a shard: which of the paths, and where its bytes are in it."""

    shard: int
    offset: int
    size: int


@dataclass(frozen=True)
class TarSample:
    """Files of one sample. key: their common name; members: extension ("jpg", "seg.png") → where."""

    key: str
    members: Mapping[str, TarMember]


class TarShards:
    """The samples of uncompressed tar files, in the order of the paths and of the files in them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """ValueError, with the shard's name: absent, no plain tar, cut, without samples, a file twice, a link."""
        self.paths = tuple(paths)
        self.samples = [sample for shard in range(len(paths)) for sample in self._index(shard)]

    def read(self, member: TarMember) -> bytes:
        """ValueError where the shard is no longer what was indexed."""
        path = self.paths[member.shard]
        # At a position, not from the current one: processes that share the open file do not disturb each other.
        content = os.pread(_opened(path).fileno(), member.size, member.offset)
        if len(content) != member.size:
            raise ValueError(
                f"{printable(path)} has become shorter since the run started; restore it and start again"
            )
        return content

    def name(self, sample: TarSample, extension: str) -> str:
        """What messages call a file: the shard and the file in it."""
        return f"{self.paths[sample.members[extension].shard]}:{sample.key}.{extension}"

    def _index(self, shard: int) -> list[TarSample]:
        found: dict[str, dict[str, TarMember]] = {}
        path = self.paths[shard]
        previous = None
        for info in _files(path):
            folder, _, file_name = info.name.rpartition("/")
            stem, _, extension = file_name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not stem or stem.startswith("__") or not extension:
                continue  # hidden files, webdataset's own notes, and what has no extension, belong to no sample
            members = found.setdefault(key, {})
            if extension.lower() in members or (members and key != previous):
                raise ValueError(
                    f"{printable(path)} holds {printable(info.name)} twice, or apart from the other files of its "
                    "sample; write the shard anew, with the files of a sample one after the other"
                )
            members[extension.lower()] = TarMember(shard, info.offset_data, info.size)
            previous = key
        if not found:
            raise ValueError(
                f"{printable(path)} holds no sample: expected files such as 0001.jpg and 0001.txt in it"
            )
        return [TarSample(key, members) for key, members in found.items()]


@dataclass(frozen=True)
class ShardReader:
    """Images in shards, see `labelled.entries.ImageReader`: an entry is a sample and its image's extension."""

    shards: TarShards

    def name(self, entry: tuple[TarSample, str]) -> str:
        return self.shards.name(*entry)

    def content(self, entry: tuple[TarSample, str]) -> bytes:
        sample, extension = entry
        return self.shards.read(sample.members[extension])


def shard_paths(patterns: str | Sequence[str]) -> list[Path]:
    """Paths of shards, with {000..003} expanded as webdataset does. ValueError for a range that falls."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return [Path(path) for pattern in patterns for path in _expanded(pattern)]


def _expanded(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    if int(first) > int(last):
        raise ValueError(f"{pattern} has {found[0]}, expected the smaller number first")
    for number in range(int(first), int(last) + 1):
        digits = str(number).zfill(len(first))
        yield from _expanded(pattern[: found.start()] + digits + pattern[found.end() :])


def _files(path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of a shard. tarfile itself takes a shard that ends between two files for whole."""
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.issym() or info.islnk():
                    raise ValueError(
                        f"{printable(path)} holds a link, {printable(info.name)}; put the file itself in"
                    )
                if info.isfile():
                    yield info
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("unexpected end of data")
    except tarfile.ReadError as error:
        raise ValueError(
            f"{printable(path)} is no whole, plain tar file ({error}): cut, compressed or of another kind; copy "
            "it again from its origin, or unpack it (gunzip)"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{printable(path)} cannot be read ({error.strerror}); check the path of the shards"
        ) from error


@lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _opened(path: Path) -> BinaryIO:
    """Opened when first read in this process, closed when so many others were read after it."""
    return path.open("rb", buffering=0)
