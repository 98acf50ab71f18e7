"""``tinyusfm-edge replay``: serves a clip live, as a probe would.

At its own rate, with faults on demand.

It prints the address to give to ``run`` or ``live`` as soon as somebody can connect, and at the end what it did.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.streams.input_report import InputReport
from tinyusfm_edge.cli.streams.loop_options import open_stream, source_options
from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import Frame
    from tinyusfm_runtime.replay.outlets import Outlet
    from tinyusfm_runtime.replay.player import PlaybackCounts

NAME = "tinyusfm-replay"
PRELOAD_BYTES = 512 << 20
"""Frames decoded before anything is sent; decoding at the same time would cost the rate."""


@reports("replay")
def replay(
    clip: Annotated[str, typer.Argument(help="Folder of images, DICOM, MetaImage or video file, phantom:FIRST-LAST.")],
    kind: Annotated[str, typer.Option("--as", help="What to be: igtl, shm or camera.")] = "igtl",
    fps: Annotated[float, typer.Option(min=0.1, max=1000, help="Frames per second.")] = 30.0,
    faults: Annotated[
        str | None, typer.Option(help="What goes wrong: drop,jitter,freeze,reorder,corrupt or some of them.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same faults.")] = 0,
    loop: Annotated[bool, typer.Option("--loop", help="Begin again at the end, until Ctrl-C.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, max=console.MOST, help="Stop after so many frames.")] = None,
    listen: Annotated[str, typer.Option(help="igtl: HOST:PORT or :PORT; port 0 takes any.")] = "127.0.0.1:18944",
    header: Annotated[int, typer.Option(min=1, max=2, help="igtl: header version, 1 or 2 (protocol 3).")] = 1,
    name: Annotated[str, typer.Option(help="shm: name of the ring.")] = NAME,
    device: Annotated[str | None, typer.Option(help="camera: output device, such as /dev/video2.")] = None,
    crop: Annotated[str | None, typer.Option(help="ROW,COL,HEIGHT,WIDTH in pixels, or region.")] = None,
    spacing: Annotated[str | None, typer.Option(help="ROW,COL distance of pixels in mm, over the clip's own.")] = None,
    output: ReportOutput = SILENT,
) -> None:
    """Serve a clip as a live probe."""
    from tinyusfm_runtime.replay.faults import plan, read_faults
    from tinyusfm_runtime.replay.outlets import IgtlOutlet
    from tinyusfm_runtime.replay.player import play

    wanted = read_faults(faults)
    if kind == "camera" and "corrupt" in wanted:
        raise InputError("a camera has no checksum that could notice corruption: leave corrupt out, or use igtl or shm")
    # a clip that cannot be read says so before anything listens
    reports: list[InputReport] = []
    frames = _frames(lambda: _read(clip, crop, spacing, reports), loop, limit)
    with _stopped_by_signals() as stop, closing(_outlet(kind, listen, header, name, device)) as outlet:
        console.say(f"{'address':<14}{outlet.address}")
        console.next_step("live", "BUNDLE", outlet.address, indent=14)
        if isinstance(outlet, IgtlOutlet):
            console.note("waiting for a receiver")
            while not stop.is_set() and not outlet.wait_for_client(0.2):
                continue
        steps = plan(frames, rate_hz=fps, faults=wanted, seed=seed)
        tally = play(steps, outlet, rate_hz=fps, seed=seed, stop=stop)
        counts = outlet.server.counts if isinstance(outlet, IgtlOutlet) else {}
    for line in _lines(tally, counts):
        console.say(line)
    output.result(
        {"sent": tally.sent, "late": tally.late, "keep_alives": tally.keep_alives}
        | {"faults": dict(tally.faults), "receivers": dict(counts)}
    )
    for report in reports[:1]:
        report.end()
    output.end("run", "BUNDLE", clip, indent=14)


def _frames(read: Callable[[], Iterator[Frame]], loop: bool, limit: int | None) -> Iterator[Frame]:
    """The clip's frames, again and again if wanted.

    Decoded beforehand as far as PRELOAD_BYTES go.
    """
    ready: list[Frame] = []
    reading = read()
    size = 0
    for frame in itertools.islice(reading, limit):
        ready.append(frame)
        size += frame.pixels.nbytes
        if size > PRELOAD_BYTES:
            console.note(f"note: only the first {len(ready)} frames are decoded beforehand; the rest may come late")
            break
    if not ready:
        raise InputError("the clip holds no frame")
    whole = size <= PRELOAD_BYTES
    again: Iterator[Frame] = itertools.cycle(ready) if whole else _for_ever(read)
    frames = itertools.chain(ready, reading, again if loop else ())
    return itertools.islice(frames, limit)


def _for_ever(read: Callable[[], Iterator[Frame]]) -> Iterator[Frame]:
    while True:
        yield from read()


def _read(clip: str, crop: str | None, spacing: str | None, reports: list[InputReport]) -> Iterator[Frame]:
    from tinyusfm_runtime.frame import LiveSource

    with open_stream(clip, source_options(crop, spacing)) as source:
        if isinstance(source, LiveSource):
            raise InputError("replay takes a clip, not a live source")
        report = InputReport(source)
        reports.append(report)
        report.say()
        yield from report.whole(source)
        report.say()


def _outlet(kind: str, listen: str, header: int, name: str, device: str | None) -> Outlet:
    from tinyusfm_runtime.replay import outlets
    from tinyusfm_runtime.transport.igtl_server import IgtlServer, read_listen_address

    if kind == "igtl":
        host, port = read_listen_address(listen)
        return outlets.IgtlOutlet(IgtlServer(host=host, port=port, header_version=header))
    if kind == "shm":
        return outlets.ShmOutlet(name)
    if kind == "camera":
        return outlets.CameraOutlet(device)
    raise InputError(f"cannot replay as {kind!r}; choose {', '.join(outlets.KINDS)}")


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set.

    The counters can then be printed and nothing is left behind.
    """
    stop = threading.Event()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lines(tally: PlaybackCounts, counts: dict[str, int]) -> list[str]:
    lines = [f"{'sent':<14}{tally.sent} frames, {tally.late} of them late, {tally.keep_alives} keep-alives"]
    if tally.faults:
        lines.append(f"{'faults':<14}{', '.join(f'{name} {count}' for name, count in sorted(tally.faults.items()))}")
    if counts:
        lines.append(f"{'receivers':<14}{counts['clients']}, {counts['clients_lost']} of them left or were dropped")
    return lines
