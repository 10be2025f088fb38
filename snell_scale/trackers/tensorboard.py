"""TensorBoard's event files, written without its package: framed records of the protocol buffer `Event`.

Sources: tensorflow/tensorboard, compat/proto/event.proto and summary.proto (field numbers), and the TFRecord
format: length, its masked CRC-32C, the data, their masked CRC-32C, little-endian. CRC-32C is RFC 3720's.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_VERSION = "brain.Event:2"
_CRC_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
_MASK_DELTA = 0xA282EAD8
# Wire types of protocol buffers.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Fields of Event, Summary, Summary.Value and SessionLog.
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY, _SESSION_LOG = 1, 2, 3, 5, 7
_VALUE, _TAG, _SIMPLE_VALUE, _STATUS = 1, 1, 2, 1
_STATUS_START = 1


class TensorBoard:
    """Writes <folder>/tensorboard/events.out.tfevents.…; show it with `tensorboard --logdir RUNS`."""

    def __init__(self, folder: Path) -> None:
        """Makes the file. OSError where that fails."""
        place = folder / "tensorboard"
        place.mkdir(parents=True, exist_ok=True)
        # A continued run adds a file: TensorBoard reads all of a folder, in the order of their names.
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (place / name).open("xb")
        self._write(_field(_FILE_VERSION, _BYTES, _VERSION.encode()))

    def start(self, num_done_steps: int) -> None:
        started = _field(_STATUS, _VARINT, _STATUS_START)
        # Makes TensorBoard drop what an earlier attempt wrote of this step and later ones.
        self._write(_field(_STEP, _VARINT, num_done_steps + 1) + _field(_SESSION_LOG, _BYTES, started))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        summary = b"".join(_field(_VALUE, _BYTES, _scalar(tag, value)) for tag, value in values.items())
        self._write(_field(_STEP, _VARINT, step) + _field(_SUMMARY, _BYTES, summary))

    def close(self, *, ok: bool) -> None:
        self._file.close()

    def _write(self, fields: bytes) -> None:
        """One event, flushed: a killed run keeps what it logged."""
        event = _field(_WALL_TIME, _FIXED64, struct.pack("<d", time.time())) + fields
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
        self._file.flush()


def _scalar(tag: str, value: float) -> bytes:
    return _field(_TAG, _BYTES, tag.encode()) + _field(_SIMPLE_VALUE, _FIXED32, struct.pack("<f", value))


def _field(number: int, kind: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer."""
    key = _varint(number << 3 | kind)
    if isinstance(value, int):
        return key + _varint(value)
    return key + (_varint(len(value)) if kind == _BYTES else b"") + value


def _varint(value: int) -> bytes:
    """Of a number that is not negative: seven bits a byte, the lowest first."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """RFC 3720's checksum."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _table_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (_CRC_POLYNOMIAL if value & 1 else 0)
    return value


_CRC_TABLE = tuple(_table_entry(byte) for byte in range(256))
