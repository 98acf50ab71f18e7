"""The error tree: every failure a caller can act on, and nothing else.

* EdgeError                 catch this to catch everything the toolkit raises on purpose
  * InputError              what was handed in is wrong: a path, a value, an option
    * FrameError            one frame cannot be used: shape, dtype, range, pixel format
      * SectorError         it shows another sector than the one the artefact was pruned to
    * SourceError           a frame source cannot be opened or broke off
      * IncompleteError     a source broke off after frames that are good: their results stand
      * NoSourceError       a live source was not there in time
    * CheckpointError       a weights file is missing, truncated, hostile or of another model
    * CalibrationError      no usable calibration data or ranges, or they leak from the test split
  * MissingExtra            a library is not installed; the message carries the pip line
  * UnsupportedError        this machine or this target cannot do what was asked
  * BundleError             a bundle cannot be trusted or read
    * TamperedError         a hash, a file list or a link does not match the manifest
    * UnverifiedError       the artefact never passed its gate and was not asked for by name
    * UntrustedError        the signature is missing, wrong, expired, for another device, or older than the floor
  * GateError               an artefact disagrees with the reference; carries the report
  * IncomparableError       two reports cannot be compared: another machine, power mode, tools or frames
  * EngineError             an engine failed to load or run, or is not the engine that was asked for
  * OutputError             a result cannot be written: no room, no permission, exists already

The tree knows nothing of exit codes except one number per class (``exit_code``), which the
command line uses: 1 for a failed gate, 2 for bad input, 3 for what this machine cannot do, 6 for
a live source that was not there. A command that keeps the results of an incomplete source ends with 4.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Root of the tree.

    The message says what was wrong and how to mend it, in one line.
    """

    exit_code = 2


class InputError(EdgeError):
    """What was handed in is wrong; hand in something else."""


class FrameError(InputError):
    """One frame cannot be used; the stream may go on."""


class SectorError(FrameError):
    """A frame shows another sector than its artefact was pruned to.

    Ask an artefact of the same bundle that looks at the whole frame.
    """


class SourceError(InputError):
    """A frame source cannot be opened, or ended where it should not have."""


class IncompleteError(SourceError):
    """A source broke off after frames that are good.

    Whoever can use those keeps what was made of them.
    """


class NoSourceError(SourceError):
    """A live source was not there, or gave no frame, within the time it was given."""

    exit_code = 6


class CheckpointError(InputError):
    """A weights file is missing, truncated, hostile, or belongs to another model."""


class CalibrationError(InputError):
    """INT8 was asked for without data or ranges that may be used for it."""


class MissingExtra(EdgeError):
    """A library is not installed.

    Args:
        feature: what was wanted, in the user's words.
        library: the distribution that is missing.
        extra: the extra of ``tinyusfm-edge`` that brings it.
    """

    exit_code = 3

    def __init__(self, feature: str, library: str, extra: str) -> None:
        from tinyusfm_runtime.installation import pip_line

        self.feature, self.library, self.extra = feature, library, extra
        super().__init__(f"{feature} needs {library}, which is not installed: {pip_line(extra)}")


class UnsupportedError(EdgeError):
    """This machine, engine or target cannot do what was asked."""

    exit_code = 3


class BundleError(EdgeError):
    """A bundle cannot be read."""


class TamperedError(BundleError):
    """The bundle's bytes are not the ones its manifest names. Do not use it."""


class UnverifiedError(BundleError):
    """The artefact has not passed its gate.

    Open it with ``allow_unverified=True`` to use it all the same.
    """


class UntrustedError(BundleError):
    """The bundle's signature does not allow it to run here.

    It is missing, wrong, expired, for another device, or older than what ran here.
    """


class GateError(EdgeError):
    """The artefact disagrees with the reference.

    Args:
        message: one line with the reasons.
        report: the parity report, for machines (any object with ``to_json``).
    """

    exit_code = 1

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class IncomparableError(EdgeError):
    """Two reports were made under circumstances that make a comparison meaningless."""

    exit_code = 5


class EngineError(EdgeError):
    """An engine failed to load or to run, or the wrong engine answered.

    The wrong one is another than the one asked for.
    """

    exit_code = 3


class OutputError(EdgeError):
    """A result cannot be written."""


__all__ = [
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "EdgeError",
    "EngineError",
    "FrameError",
    "GateError",
    "IncomparableError",
    "IncompleteError",
    "InputError",
    "MissingExtra",
    "NoSourceError",
    "OutputError",
    "SectorError",
    "SourceError",
    "TamperedError",
    "UnsupportedError",
    "UntrustedError",
    "UnverifiedError",
]
