"""Image-text pairs as they lie on disk: CSV lists, webdataset shards, Hugging Face data sets.

Captions are read here, once; images when they are looked up.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from snell_scale.data.images import BrokenImage, printable
from snell_scale.data.labelled.checks import check_present
from snell_scale.data.labelled.entries import FileReader, ImageReader
from snell_scale.data.tar_shards import ShardReader, TarSample, TarShards, shard_paths

_IMAGES = ("jpg", "jpeg", "png", "webp")


class Pair(NamedTuple):
    """A caption and where its image is.

    entry: what the source's reader takes; image_id: equal for captions of one image; label: as it stands there;
    where: what messages call it.
    """

    entry: Any
    caption: str
    image_id: str
    label: str | None
    where: str


class PairSource(NamedTuple):
    """One split, or what splits are made of. class_names: where the data themselves name their labels."""

    reader: ImageReader
    pairs: Sequence[Pair]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """What the columns of a table, or the keys of a sample's JSON, are called; None: the format's usual name."""

    image: str | None
    caption: str | None
    label: str | None
    image_id: str | None


def read_csv(path: Path, columns: Columns, *, separator: str | None, needs_images: bool) -> PairSource:
    """A line is a pair; images are relative to the file. Columns by default as open_clip's: filepath, title.

    separator: None means tab for .tsv and comma otherwise. needs_images: an image that is not there is a
    ValueError; so are, with the line, columns that are not there and what is no UTF-8 or no CSV.
    """
    image, caption = columns.image or "filepath", columns.caption or "title"
    lines = list(_csv_lines(path, separator or ("\t" if path.suffix.lower() == ".tsv" else ",")))
    header = list(lines[0][1]) if lines else []
    _check_columns(path, header, [image, caption, columns.label, columns.image_id])
    pairs = [
        Pair(
            entry=row[image],
            caption=row[caption],
            image_id=row[columns.image_id] if columns.image_id else str(path.absolute().parent / row[image]),
            label=row[columns.label] if columns.label else None,
            where=f"{path} line {line}",
        )
        for line, row in lines
    ]
    if needs_images:
        check_present(path.parent, list(dict.fromkeys(pair.entry for pair in pairs)), where=str(path))
    return PairSource(FileReader(path.parent), pairs)


def read_webdataset(patterns: Sequence[str], columns: Columns) -> PairSource:
    """A sample is an image with .txt (one caption) or .json (one, or a list of them), and may have .cls, a label.

    ValueError names the file: see `TarShards`; also a sample without an image or a caption, or not in UTF-8.
    """
    shards = TarShards(shard_paths(patterns))
    pairs = [pair for sample in shards.samples for pair in _pairs_of(shards, sample, columns)]
    return PairSource(ShardReader(shards), pairs)


def read_hf(folder: Path, columns: Columns) -> PairSource:
    """A folder that `save_to_disk` of Hugging Face's datasets wrote; captions are a string or a list of them.

    Columns by default: image, caption. ValueError: no such folder, columns that are not there or hold no images.
    """
    datasets = _import_datasets()
    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:  # as damaged folders were seen to raise
        raise ValueError(f"{folder} is no data set that datasets' save_to_disk wrote ({error})") from error
    if isinstance(table, datasets.DatasetDict):
        raise ValueError(
            f"{folder} holds the splits {', '.join(table)}; name one of them, e.g. {folder}/{next(iter(table))}"
        )
    image, caption = columns.image or "image", columns.caption or "caption"
    _check_columns(folder, table.column_names, [image, caption, columns.label, columns.image_id])
    if not isinstance(table.features[image], datasets.Image):
        raise ValueError(
            f"{folder}: column {image!r} is {table.features[image]}, expected images (datasets.Image)"
        )
    names = getattr(table.features[columns.label], "names", None) if columns.label else None
    captions, labels, ids = (
        list(table[column]) if column else None for column in (caption, columns.label, columns.image_id)
    )
    pairs = [
        Pair(
            entry=row,
            caption=text,
            image_id=str(ids[row]) if ids else f"{folder} row {row}",
            label=None if labels is None else _label(labels[row], names),
            where=f"{folder} row {row}",
        )
        for row, texts in enumerate(captions or [])
        for text in _texts(texts)
    ]
    stored = table.cast_column(image, datasets.Image(decode=False)).select_columns([image])
    return PairSource(_TableReader(folder, stored, image), pairs, tuple(names or ()))


@dataclass(frozen=True)
class _TableReader:
    """An entry is a row."""

    folder: Path
    table: Any
    column: str

    def name(self, entry: int) -> str:
        return f"{self.folder} row {entry}"

    def content(self, entry: int) -> Path | bytes:
        stored = self.table[entry][self.column]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise BrokenImage(f"{self.name(entry)} has no image; remove the row")
        return Path(stored["path"]) if stored["bytes"] is None else stored["bytes"]


def _csv_lines(path: Path, separator: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """(line number, column → value) of each row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=separator, strict=True)
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path} line {rows.line_num} has another number of columns than its header; put "
                        f"captions with {separator!r} in them in quotes"
                    )
                yield rows.line_num, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no well-formed CSV ({error}); check its quotes") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path") from error


def _check_columns(where: Path, found: Sequence[str], wanted: Sequence[str | None]) -> None:
    missing = [name for name in wanted if name is not None and name not in found]
    if missing:
        raise ValueError(
            f"{where} has no column {missing[0]!r}; it has {', '.join(found) or 'no row'}. Set "
            "data.image_column, data.caption_column, data.label_column or data.image_id_column, or data.separator"
        )


def _pairs_of(shards: TarShards, sample: TarSample, columns: Columns) -> Iterator[Pair]:
    extension = next((extension for extension in _IMAGES if extension in sample.members), None)
    first = shards.name(sample, next(iter(sample.members)))
    if extension is None:
        raise ValueError(f"{printable(first)} has no image beside it, expected .{', .'.join(_IMAGES)}")
    notes = _json(shards, sample) if "json" in sample.members else {}
    if "txt" in sample.members:
        texts = [_text(shards, sample, "txt").strip()]
    else:
        texts = _texts(notes.get(columns.caption or "caption"))
    label = notes.get(columns.label) if columns.label else None
    if "cls" in sample.members:
        label = _text(shards, sample, "cls").strip()
    where = shards.name(sample, extension)
    for text in texts:
        yield Pair((sample, extension), text, where, None if label is None else str(label), where)


def _text(shards: TarShards, sample: TarSample, extension: str) -> str:
    try:
        return shards.read(sample.members[extension]).decode("utf-8")
    except UnicodeDecodeError as error:
        name = printable(shards.name(sample, extension))
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}); write the shard anew") from error


def _json(shards: TarShards, sample: TarSample) -> Mapping[str, Any]:
    try:
        notes = json.loads(_text(shards, sample, "json"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{printable(shards.name(sample, 'json'))} is no JSON ({error})") from error
    return notes if isinstance(notes, Mapping) else {}


def _texts(found: Any) -> list[str]:
    """One caption or several; what is none counts as an empty one, which is reported with all others."""
    texts = found if isinstance(found, list) else [found]
    return [text if isinstance(text, str) else "" for text in texts] or [""]


def _label(value: Any, names: Sequence[str] | None) -> str:
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)


def _import_datasets() -> Any:
    try:
        import datasets  # seconds of import that only this format needs
    except ModuleNotFoundError as error:
        raise ValueError(f"data.format=hf needs {error.name}: pip install snell-scale[data]") from error
    return datasets
