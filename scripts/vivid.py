"""Runs a Python program on this machine's files but on a kernel of its own, with the virtual video driver vivid.

    python scripts/vivid.py --files DIR program.py [argument ...]

DIR holds Debian packages that were unpacked, none of them installed (``apt-get download``, ``dpkg -x``): ``kernel``
with a linux-image, ``root`` with qemu-system-x86, its data, libraries and firmware, busybox-static, kmod and v4l-utils.
QEMU emulates (no /dev/kvm needed), the guest sees the host's files read-only over 9p, and there is no network. The
exit code is the program's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODULES = ("9p", "9pnet_virtio", "virtio_pci", "vivid")
VIVID = (
    "n_devs=1 node_types=0x101 vid_cap_nr=0 vid_out_nr=1 input_types=0xd num_inputs=2 output_types=0x1 num_outputs=1"
)
"""Input 0 a television, input 1 HDMI, the one output HDMI: images can be looped from there to input 1."""
MARK = "exit code of the program:"
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /host
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
{insmod}
/bin/busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=262144 host /host
/bin/busybox mount --bind /dev /host/dev
/bin/busybox mount --bind /proc /host/proc
/bin/busybox mount --bind /sys /host/sys
/bin/busybox chroot /host {command}
/bin/busybox echo "{mark} $?"
/bin/busybox poweroff -f
"""


def module_order(folder: Path) -> list[Path]:
    """Files of MODULES and of what they need, needed ones first."""
    done = folder / "modules.dep"
    if not done.is_file():
        base = folder.parents[2]
        depmod = next(folder.parents[3].glob("root/**/bin/kmod"))
        subprocess.run(["depmod", "-b", str(base), folder.name], executable=depmod, check=True)
    needs: dict[str, list[str]] = {}
    for line in done.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        needs[name] = rest.split()
    by_stem = {Path(name).name.split(".")[0].replace("-", "_"): name for name in needs}
    order: list[str] = []
    for wanted in MODULES:
        if wanted in by_stem:  # else built into the kernel
            found = by_stem[wanted]
            order += [part for part in [*reversed(needs[found]), found] if part not in order]
    return [folder / name for name in order]


def cpio(files: dict[str, tuple[int, bytes]]) -> bytes:
    """An archive in the kernel's own form (newc) of path -> (mode, content)."""
    out = bytearray()
    for number, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))]):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(f"{field:08x}".encode() for field in fields) + name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def initramfs(files: Path, command: str) -> bytes:
    """Busybox, modules and an init that runs a command in the host's root."""
    kernel = next((files / "kernel" / "lib" / "modules").iterdir())
    modules = module_order(kernel)
    insmod = [f"/bin/busybox insmod /m/{path.name} {VIVID if path.stem == 'vivid' else ''}" for path in modules]
    init = INIT.format(insmod="\n".join(insmod), command=command, mark=MARK)
    packed: dict[str, tuple[int, bytes]] = {"bin": (0o40755, b""), "m": (0o40755, b""), "dev": (0o40755, b"")}
    packed["bin/busybox"] = (0o100755, next(files.glob("root/**/bin/busybox")).read_bytes())
    packed["init"] = (0o100755, init.encode())
    for path in modules:
        packed[f"m/{path.name}"] = (0o100644, path.read_bytes())
    return cpio(packed)


def run(files: Path, arguments: list[str], timeout_s: float) -> int:
    """Boots, runs, prints what the program printed.

    Args:
        files: the folder of unpacked packages.
        arguments: program and arguments, run by this interpreter.
        timeout_s: for all of it.

    Returns:
        The program's exit code; 125 if the guest never got so far.
    """
    root = files / "root"
    libraries = f"{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"
    paths = ":".join(path for path in sys.path if path)
    words = [
        f"PYTHONPATH={paths}",
        "PYTHONDONTWRITEBYTECODE=1",
        "PYTHONUNBUFFERED=1",
        f"V4L2_CTL={root}/usr/bin/v4l2-ctl",
    ]
    words += [f"V4L2_LIBRARIES={libraries}", sys.executable, str(Path(arguments[0]).resolve()), *arguments[1:]]
    with tempfile.TemporaryDirectory() as place:
        initrd = Path(place) / "initrd"
        initrd.write_bytes(initramfs(files, "/usr/bin/env " + " ".join(f"'{word}'" for word in words)))
        command = [
            f"{root}/usr/bin/qemu-system-x86_64", "-L", f"{root}/usr/share/qemu", "-L", f"{root}/usr/share/seabios",
            "-L", f"{root}/usr/lib/ipxe/qemu",
            "-accel", "tcg,thread=single", "-cpu", "max,la57=off", "-m", "1500", "-nographic", "-no-reboot",
            "-kernel", str(next((files / "kernel" / "boot").glob("vmlinuz-*"))), "-initrd", str(initrd),
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check",
            "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap", "-net", "none",
        ]  # fmt: skip
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
        output = Path(place) / "said"
        with output.open("wb") as file:
            # a file and no pipe, so that what was said until a timeout is there
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                print(f"no end within {timeout_s:.0f} s", file=sys.stderr)
        text = output.read_text(encoding="utf-8", errors="replace")
    print(text)
    return int(text.rpartition(MARK)[2].split()[0]) if MARK in text else 125


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=Path, required=True, help="folder of unpacked packages")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for all of it")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    return run(given.files.resolve(), given.program, given.timeout)


if __name__ == "__main__":
    sys.exit(main())
