"""``tinyusfm-edge bundle``: sign, check a signature, trace, gather for C."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.panels import show_help_alone
from tinyusfm_edge.cli.trust.diff import diff
from tinyusfm_edge.cli.trust.dossier import dossier
from tinyusfm_edge.cli.trust.trace import trace
from tinyusfm_runtime.errors import InputError

bundle = typer.Typer(rich_markup_mode=None, help="Sign a bundle, check its signature, ship it with a program in C.")
PASSWORD_VARIABLE = "TINYUSFM_KEY_PASSWORD"
"""Environment variable with the password of an encrypted key; a password has no place on a command line."""


@bundle.callback(invoke_without_command=True)
def _alone(context: typer.Context) -> None:
    """Sign a bundle, check its signature, ship it with a program in C."""
    show_help_alone(context)


@bundle.command("for-c", epilog="Example: tinyusfm-edge bundle for-c device fetal-head.bundle --target onnx")
@reports("bundle for-c")
def for_c(
    out: Annotated[Path, typer.Argument(help="Folder to be made.")],
    source: Annotated[Path, typer.Argument(metavar="bundle", help="The bundle's folder.")],
    target: Annotated[str | None, typer.Option(help="Target of the one artefact. Default: the first.")] = None,
    precision: Annotated[str | None, typer.Option(help="Its precision. Default: the first.")] = None,
    prefix: Annotated[Path, typer.Option(help="Where the C runtime was installed or built.")] = Path("build/capi"),
    output: ReportOutput = SILENT,
) -> None:
    """Gather library, engine, headers, licences and a bundle for a program in C.

    The bundle is of one target.
    """
    from tinyusfm_export.for_c import gather

    parts = gather(source, out, prefix=prefix, target=target, precision=precision)
    rows = [(part.name, f"{part.files}", f"{part.size_bytes / 1e6:.2f} MB") for part in parts]
    console.say(console.table(("part", "files", "size"), rows))
    console.say(f"folder       {out}, {sum(part.size_bytes for part in parts) / 1e6:.1f} MB")
    output.result(
        {
            "folder": str(out),
            "parts": [{"name": part.name, "files": part.files, "size_bytes": part.size_bytes} for part in parts],
        }
    )
    output.end("bundle", "sign", source, "--key", "release.pem", "--security-version", 1)


@bundle.command(epilog="Example: tinyusfm-edge bundle sign fetal-head.bundle --key release.pem --security-version 7")
@reports("bundle sign")
def sign(
    folder: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    security_version: Annotated[
        int, typer.Option(min=0, max=console.MOST, help="Devices refuse a lower one than they have run.")
    ],
    key: Annotated[Path | None, typer.Option(help="Private key in PEM, P-256 or P-384.")] = None,
    pkcs11: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Key in a token, such as pkcs11:token=T;object=K?module-path=M.so"),
    ] = None,
    device_class: Annotated[str | None, typer.Option(help="Only devices of this class open it.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a signature that is there.")] = False,
    output: ReportOutput = SILENT,
) -> None:
    """Sign a bundle.

    The signature covers every byte and names version and device class.
    """
    from tinyusfm_edge.release.sign import key_signer, sign_bundle
    from tinyusfm_edge.release.token import PIN_VARIABLE, token_signer

    if (key is None) == (pkcs11 is None):
        raise InputError("give --key or --pkcs11, one of them")
    if pkcs11 is not None:
        signer = token_signer(pkcs11, os.environ.get(PIN_VARIABLE))
    else:
        assert key is not None
        password = os.environ.get(PASSWORD_VARIABLE)
        signer = key_signer(key, password.encode() if password is not None else None)
    place = sign_bundle(folder, signer, security_version=security_version, device_class=device_class, replace=replace)
    console.say(f"{'signature':<14}{place}")
    console.say(f"{'key':<14}{signer.fingerprint}")
    output.result({"signature": str(place), "key": signer.fingerprint, "security_version": security_version})
    output.end("bundle", "check-signature", folder, "--trust", "trust/", indent=14)


@bundle.command(epilog="Example: tinyusfm-edge bundle check-signature fetal-head.bundle --trust trust/")
@reports("bundle check-signature")
def check_signature(
    folder: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    trust: Annotated[Path, typer.Option(help="Trust store: folder with trust.json and public keys.")],
    device_class: Annotated[str | None, typer.Option(help="Class of the device it is meant for.")] = None,
    output: ReportOutput = SILENT,
) -> None:
    """Check a bundle's signature as a device would, without raising its floor."""
    from tinyusfm_runtime.bundle.reader import Bundle
    from tinyusfm_runtime.trust.policy import Trust
    from tinyusfm_runtime.trust.rollback import ReadOnlyFloor
    from tinyusfm_runtime.trust.store import TrustStore

    demand = Trust(store=TrustStore.open(trust), device_class=device_class, floor=ReadOnlyFloor())
    opened = Bundle.open(folder, trust=demand, on_device=False)
    assert opened.binding is not None
    console.say(f"{'bundle':<22}{opened.binding.bundle_id}")
    console.say(f"{'security version':<22}{opened.binding.security_version}")
    console.say(f"{'device class':<22}{opened.binding.device_class or 'any'}")
    console.say(f"{'signature':<22}good")
    found = opened.binding
    output.result(
        {"bundle": found.bundle_id, "security_version": found.security_version, "device_class": found.device_class}
    )
    output.end("run", folder, "phantom:0-9", "--require-signed", trust, indent=22)


bundle.command(epilog="Example: tinyusfm-edge bundle trace fetal-head.bundle --images hc18")(trace)
bundle.command(epilog="Example: tinyusfm-edge bundle dossier fetal-head.bundle --out dossier/")(dossier)
bundle.command(epilog="Example: tinyusfm-edge bundle diff old.bundle new.bundle --protocol pccp.toml --data hc18")(diff)


__all__ = ["PASSWORD_VARIABLE", "bundle", "check_signature", "for_c", "sign"]
