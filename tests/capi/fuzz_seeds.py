"""Writes the seeds of the fuzz targets again: ``python -m tests.capi.fuzz_seeds``, into runtime/capi/fuzz/seeds."""

from __future__ import annotations

import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np

from tests.capi.conftest import SOURCE, stub_parts
from tests.runtime import integer_models as models
from tests.runtime.test_integer_engine import MAKERS
from tinyusfm_runtime.engines.integer.layout import TYPES
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.transport.shm_result import ResultWriter, RingReading
from tinyusfm_runtime.transport.shm_writer import ShmWriter
from tinyusfm_runtime.trust.envelope import pre_authentication, write_envelope
from tinyusfm_runtime.trust.statement import Binding, statement_bytes

SEEDS = SOURCE / "fuzz" / "seeds"
MOST_BYTES = 6000
"""Of a model's seed."""


def table_of(tensors: models.Tensors) -> bytes:
    """Tensors as fuzz/table.h reads them."""
    parts = [struct.pack("<i", len(tensors))]
    for name, value in tensors.items():
        kind = TYPES.index(value.dtype.str.replace("|", ""))
        shape = (*value.shape, 0, 0, 0, 0)[:4]
        parts += [struct.pack("<64sii4qq", name.encode(), kind, value.ndim, *shape, value.nbytes), value.tobytes()]
    return b"".join(parts)


def newest(ring: bytes, count: int) -> bytes:
    """A ring's header and so many bytes of its newest slot: what fuzz/ring.c lays out."""
    slots, stride = struct.unpack_from("<IQ", ring, 12)
    (published,) = struct.unpack_from("<Q", ring, 64)
    at = 128 + (published - 1) % slots * stride
    return ring[:128] + ring[at : at + count]


def of_any_time(seed: bytes) -> bytes:
    """A frame's seed as if published when the machine started.

    A reader refuses a frame of a time to come, and this machine may be up for longer than the one that fuzzes.
    """
    changed = bytearray(seed)
    struct.pack_into("<Q", changed, 128 + 32, 1)
    struct.pack_into("<I", changed, 128 + 124, zlib.crc32(changed[128 + 8 : 128 + 124]))
    return bytes(changed)


def frames(room: int, count: int) -> bytes:
    """The seed of a ring of so much room a slot with so many frames of 8 x 12."""
    with ShmWriter("tusfm-fuzz-seed", room) as writer:
        for seq in range(count):
            writer.write(Frame(pixels=np.full((8, 12), seq, np.uint8), spacing_mm=(0.5, 0.5), seq=seq))
        return of_any_time(newest(Path("/dev/shm/tusfm-fuzz-seed").read_bytes(), 128 + 96))


def main() -> None:
    """Writes all of them."""
    for name in ("manifest", "model", "ring"):
        (SEEDS / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        manifest = (stub_parts("", "").publish(Path(folder) / "seed.bundle") / "manifest.json").read_bytes()
    for first, name in ((b"\0", "plain"), (b"\1", "repaired")):
        (SEEDS / "manifest" / name).write_bytes(first + manifest)
    for kind, make in MAKERS.items():
        small = (table_of(make(np.random.default_rng(seed))[1]) for seed in range(1000))
        (SEEDS / "model" / kind.replace(" ", "-")).write_bytes(next(seed for seed in small if len(seed) < MOST_BYTES))
    with ResultWriter("tusfm-fuzz-seed", 256) as results:
        results.write(RingReading(seq=1, mask_HW=np.ones((8, 8), np.uint8), answered=True, valid=True))
        answers = Path("/dev/shm/tusfm-fuzz-seed").read_bytes()
    for mode in (4, 7):
        (SEEDS / "ring" / f"results{mode}").write_bytes(bytes([mode]) + newest(answers, 256 + 64))
    for mode in range(4):
        (SEEDS / "ring" / f"frames{mode}").write_bytes(bytes([mode]) + frames(1856, 3))
    # cut short: behind the first slot's header; between a slot's header and its content, which lies on the next page
    (SEEDS / "ring" / "cut-after").write_bytes(bytes([3 + 8]) + frames(1856, 1))
    (SEEDS / "ring" / "cut-before").write_bytes(bytes([3 + 16]) + frames(1280 - 128, 4))
    write_signatures()


def write_signatures() -> None:
    """A signature file, its statement and its key, each behind the byte that chooses its reader."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    private = ec.generate_private_key(ec.SECP256R1())
    binding = Binding(bundle_id="0" * 16, spec_sha256="1" * 64, device_class="cart", security_version=3)
    payload = statement_bytes("bundle", {"manifest.json": "2" * 64, "a/b": "3" * 64}, binding)
    signature = private.sign(pre_authentication(payload), ec.ECDSA(SHA256()))
    pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (SEEDS / "signature").mkdir(exist_ok=True)
    (SEEDS / "signature" / "file").write_bytes(b"\0" + write_envelope(payload, signature, "4" * 64))
    (SEEDS / "signature" / "statement").write_bytes(b"\1" + payload)
    (SEEDS / "signature" / "key").write_bytes(b"\2" + pem)


if __name__ == "__main__":
    main()
