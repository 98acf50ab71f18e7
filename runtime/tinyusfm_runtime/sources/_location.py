"""Locations as people type them.

Paths that look like addresses, file URLs, and kinds of files that nothing here reads.

A path that exists is a path, whatever it looks like: ``10:30:00.mp4`` and ``camera:0.png`` are names of files where
such files lie. It opens nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tinyusfm_runtime.errors import InputError

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
NETWORK = ("http", "https", "rtsp", "rtsps", "rtmp", "rtp", "udp", "tcp", "srt", "ftp", "s3", "gs", "smb")
"""Schemes of addresses that nothing here fetches."""
CONVERT = {
    (".mhd",): "MetaImage in two files: write it as one .mha, for instance with 3D Slicer or SimpleITK",
    (".nrrd", ".nhdr"): "NRRD: write it as .mha, for instance with 3D Slicer or SimpleITK",
    (".nii", ".nii.gz", ".hdr", ".img"): "NIfTI or Analyze: write its slices as PNG, for instance with nibabel",
    (".npy", ".npz"): "NumPy arrays: write them as PNG, or hand them to Session.predict as frames",
    (".mat",): "MATLAB data: write the images with imwrite as PNG",
    (".h5", ".hdf5", ".uff"): "HDF5: write its images as PNG, for instance with h5py",
    (".vol",): "GE Kretz volumes: export DICOM or a video on the scanner",
    (".rf", ".raw", ".bin", ".iq", ".lzo"): "raw data without a header: scan-convert them and write PNG or .mha",
    (".bag", ".db3", ".mcap"): "ROS recordings: write their images as PNG, for instance with the rosbags package",
    (
        ".heic",
        ".heif",
        ".avif",
        ".jxl",
        ".jls",
        ".psd",
        ".svg",
        ".tga",
        ".exr",
        ".pam",
        ".svgz",
    ): "convert it to PNG, for instance with ImageMagick (magick FILE file.png)",
    (".rm", ".rmvb", ".swf", ".dv", ".mpv", ".ivf", ".h264", ".264", ".hevc", ".265"): "re-wrap it as MKV: "
    "ffmpeg -i FILE -c copy file.mkv",
    (".ppt", ".pptx", ".pdf", ".doc", ".docx"): "a document: export the video or the images in it",
    (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"): "an archive: unpack it and give the file or folder inside",
    (".csv", ".json", ".xlsx"): "a table: give the folder of images, or run the command that takes tables (--data)",
}
"""Suffixes of kinds that are not read -> what they are and a way to something that is."""


def local_path(location: str, schemes: Iterable[str]) -> str:
    """A location with every path in it made recognisable as a path.

    Args:
        location: as typed.
        schemes: names of the sources, such as ``dicom``.

    Returns:
        ``./`` in front of a relative path that would be taken for a scheme; the path of a file URL; else as typed.
    """
    if location.startswith("file:"):
        return unquote(urlsplit(location).path) or location
    scheme, colon, _ = location.partition(":")
    known = scheme in schemes or URL.match(location) is None
    if colon and known and _exists(location) and not Path(location).is_absolute():
        return f"./{location}"
    return location


def path_of(location: str, schemes: Iterable[str]) -> Path:
    """The path that a location means, for comparing it with other paths.

    Args:
        location: as typed.
        schemes: names of the sources.
    """
    text = local_path(location, schemes)
    scheme, colon, rest = text.partition(":")
    return Path(rest if colon and scheme in schemes else text)


def refuse_network(location: str) -> None:
    """Refuses an address that would have to be fetched.

    Raises:
        InputError: it is one; the message says what to do instead.
    """
    found = URL.match(location)
    if found is not None and found[1].lower() in NETWORK:
        raise InputError(
            f"{found[1].lower()}:// addresses are not read: record them first (ffmpeg -i ADDRESS -c copy clip.mkv), or "
            "send the frames by OpenIGTLink or shared memory"
        )


def why_not(location: str) -> str:
    """Why nothing reads a location, and what to do, one line.

    "" where there is nothing special about it.
    """
    name = location.lower()
    for suffixes, way in CONVERT.items():
        if name.endswith(suffixes):
            suffix = max((each for each in suffixes if name.endswith(each)), key=len)
            return f"{suffix} files are not read ({way})"
    if not _exists(location) and ("/" in location or "." in location):
        return "there is no such file or folder"
    return ""


def _exists(location: str) -> bool:
    try:
        return os.path.lexists(location)
    except ValueError:  # a NUL inside
        return False


__all__ = [
    "CONVERT",
    "NETWORK",
    "URL",
    "local_path",
    "path_of",
    "refuse_network",
    "why_not",
]
