"""Kinds of image files.

Known by their first bytes, else by the suffix of their name.

``readable_kind`` gives what the decoder reads; ``known_kind`` also names kinds that it does not, so that a file which
is left out can be counted under a name that people know.
"""

from __future__ import annotations

from pathlib import Path

READABLE = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe", ".jif"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "WebP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "JPEG 2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PNM": (".pgm", ".ppm", ".pbm", ".pnm", ".pfm"),
}
"""Kinds that the decoder reads, and the suffixes of their names."""
OTHERS = {
    "DICOM": (".dcm", ".dicom", ".ima"),
    "HEIC": (".heic", ".heif"),
    "AVIF": (".avif",),
    "JPEG XL": (".jxl",),
    "JPEG-LS": (".jls",),
    "SVG": (".svg",),
    "Photoshop": (".psd",),
    "TGA": (".tga",),
    "OpenEXR": (".exr",),
    "Radiance HDR": (".hdr",),
    "camera raw": (".dng", ".cr2", ".nef", ".arw"),
    "MetaImage": (".mha", ".mhd"),
    "NRRD": (".nrrd", ".nhdr"),
    "NIfTI": (".nii",),
    "NumPy": (".npy", ".npz"),
    "PAM": (".pam",),
    "motion JPEG": (".mjpeg", ".mjpg"),
    "video": (
        ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".mts",
        ".m2ts", ".ogv", ".vob", ".asf",
    ),
}  # fmt: skip
"""Kinds of image files that the decoder does not read."""
SNIFF_BYTES = 132
"""So many first bytes tell a kind."""
SUFFIXES = frozenset(suffix for suffixes in READABLE.values() for suffix in suffixes)
"""Suffixes of names of readable kinds, lower case."""
_BY_SUFFIX = {suffix: kind for table in (READABLE, OTHERS) for kind, suffixes in table.items() for suffix in suffixes}
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"v/1\x01", "OpenEXR"),
    (b"P7\n", "PAM"),
)


def kind_of_bytes(start: bytes) -> str | None:
    """The kind that the first bytes of a file tell.

    Args:
        start: the first SNIFF_BYTES bytes, or all there are.

    Returns:
        A name out of READABLE or OTHERS, or None.
    """
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    if start[128:132] == b"DICM":
        return "DICOM"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WebP"
    if start[:2] == b"BM" and len(start) >= 26 and start[6:10] == b"\0\0\0\0":
        return "BMP"
    if start[:1] == b"P" and start[1:2] in b"123456fF" and start[2:3] in (b"\n", b" ", b"\t", b"\r", b"#"):
        return "PNM"
    return _iso_kind(start) if start[4:8] == b"ftyp" else None


def _iso_kind(start: bytes) -> str:
    brand = start[8:12]
    if brand in (b"avif", b"avis"):
        return "AVIF"
    return "HEIC" if brand in (b"heic", b"heix", b"mif1", b"msf1", b"hevc") else "video"


def known_kind(path: Path) -> str | None:
    """The kind of an image file by its first bytes, else by its name.

    None if it is neither.

    Args:
        path: a file; one that cannot be read is known by its name.
    """
    try:
        with path.open("rb") as file:
            found = kind_of_bytes(file.read(SNIFF_BYTES))
    except OSError:
        found = None
    # NIfTI is often named .nii.gz
    if found == "JPEG" and path.suffix.lower() in OTHERS["motion JPEG"]:
        return "motion JPEG"
    suffix = ".nii" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
    return found or _BY_SUFFIX.get(suffix)


__all__ = ["OTHERS", "READABLE", "SNIFF_BYTES", "SUFFIXES", "kind_of_bytes", "known_kind"]
