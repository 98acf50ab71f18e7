"""Deflated DICOM files (PS3.5 A.5), unpacked into memory under a limit.

What comes out is the uncompressed file that they stand for.

The limit holds before more is unpacked, so a small file that would fill the memory is refused in time. A stream that
breaks off gives what is there; what is missing then shows as in a file that was cut off. It reads no element.
"""

from __future__ import annotations

import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

from tinyusfm_runtime.errors import SourceError

MAX_UNPACKED_BYTES = 1 << 28
"""Of a deflated file, unpacked."""
PIECE_BYTES = 1 << 20
RAW_DEFLATE = -15
"""zlib's name of a stream without head and checksum (RFC 1951), which the standard demands."""


def inflate(pydicom: Any, path: Path, meta: Any) -> bytes:
    """The file as it would be uncompressed (Explicit VR Little Endian).

    Args:
        pydicom: the library.
        path: the deflated file.
        meta: its file meta information, as pydicom reads it.

    Raises:
        SourceError: it is damaged from the start, or unpacks to more than MAX_UNPACKED_BYTES.
    """
    with path.open("rb") as file:
        pydicom.filereader.read_preamble(file, False)
        pydicom.filereader._read_file_meta_info(file)
        packed = file.read()
    plain = BytesIO()
    plain.write(bytes(128) + b"DICM")
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    pydicom.filewriter.write_file_meta_info(plain, meta, enforce_standard=False)
    stream = zlib.decompressobj(RAW_DEFLATE)
    start = plain.tell()
    while packed and not stream.eof:
        try:
            piece = stream.decompress(packed, PIECE_BYTES)
        except zlib.error as error:
            if plain.tell() == start:
                raise SourceError("the deflated DICOM file is damaged: its data cannot be unpacked") from error
            break
        packed = stream.unconsumed_tail
        plain.write(piece)
        if plain.tell() > MAX_UNPACKED_BYTES:
            raise SourceError(
                f"the deflated DICOM file unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB: re-save it "
                "uncompressed, for instance with dcmconv +te"
            )
    return plain.getvalue()


__all__ = ["MAX_UNPACKED_BYTES", "PIECE_BYTES", "RAW_DEFLATE", "inflate"]
