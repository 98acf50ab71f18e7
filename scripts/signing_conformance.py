"""Both directions against the OpenSSF model-signing tool, in an environment of its own: ``make signing``.

Signs a bundle here and verifies it there, signs it there and reads it here. The tool is installed into a temporary
environment (its version 1.1.1 needs pyOpenSSL beside it to start) and is no dependency of the toolkit.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

TOOL = ("model-signing==1.1.1", "pyOpenSSL")


def run(*words: str | Path) -> None:
    """Runs a command; its failure is this script's."""
    subprocess.run([str(word) for word in words], check=True)


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A new P-256 key pair: paths of the private and the public key."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def main() -> int:
    """Runs both directions; exits with the failing command's code."""
    from tinyusfm_edge.release.sign import key_signer
    from tinyusfm_runtime.trust.envelope import (
        check_signature,
        pre_authentication,
        read_envelope,
        read_public_key,
        write_envelope,
    )
    from tinyusfm_runtime.trust.statement import Binding, read_statement, statement_bytes

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "venv", folder / "env")
        python = folder / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", *TOOL)
        private, public = make_keys(folder)
        model = folder / "model"
        (model / "inner").mkdir(parents=True)
        (model / "manifest.json").write_bytes(b"{}")
        (model / "inner" / "weights.bin").write_bytes(bytes(range(256)))
        digests = {
            path.relative_to(model).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in model.rglob("*")
            if path.is_file()
        }
        binding = Binding(bundle_id="0" * 16, spec_sha256="0" * 64, device_class="cart", security_version=3)
        signer = key_signer(private)
        payload = statement_bytes("model", digests, binding)
        ours = write_envelope(payload, signer.sign(pre_authentication(payload)), signer.fingerprint)
        (model / "model.sig").write_bytes(ours)
        tool = (python, "-m", "model_signing")
        run(*tool, "verify", "key", model, "--signature", model / "model.sig", "--public_key", public)
        print("signed here, verified there: good", flush=True)
        theirs = folder / "theirs.sig"
        (model / "model.sig").unlink()
        run(*tool, "sign", "key", model, "--signature", theirs, "--private_key", private)
        envelope = read_envelope(theirs.read_bytes())
        check_signature(envelope, read_public_key(public.read_bytes()))
        if dict(read_statement(envelope.payload).digests) != digests:
            print("signed there: the list of files differs", file=sys.stderr)
            return 1
        print("signed there, read here: good")
    return 0


if __name__ == "__main__":
    sys.exit(main())
