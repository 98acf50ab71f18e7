"""Early exits: when a classifier stops.

Also the chain of graphs that makes stopping save time.

The rule is that of EPEE (arXiv 2503.02053): normalised entropy below a threshold, or patience. Entropy is divided by
log K, so that a threshold means the same for any number of classes.

An artefact whose files are named ``stage1.model.onnx``, ``stage2.model.onnx``, ... is a chain. Each stage is a graph of
its own in an engine of its own: the first takes the image, the others the tokens of the one before; all give
``logits``, and all but the last give ``tokens_out``. It does not know libraries, bundles or frames.

Shapes: NCHW image; B = 1, N tokens, D width; E exits with the classifier at the end last, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tinyusfm_runtime.engines import Engine, EngineConfig
from tinyusfm_runtime.errors import BundleError, EngineError, InputError
from tinyusfm_runtime.numerics.postprocess import check_logits, probabilities
from tinyusfm_runtime.spec import LOGITS_NAME, ExitPolicy, ModelSpec, TensorSpec


def normalised_entropy(probabilities_K: np.ndarray) -> float:
    """Entropy divided by log K: 0 for a certain answer, 1 for an even one.

    Args:
        probabilities_K: summing to 1, at least two.

    Raises:
        InputError: fewer than two classes.
    """
    p = np.asarray(probabilities_K, np.float64)
    if p.size < 2:
        raise InputError("entropy needs at least two classes")
    positive = p[p > 0]
    return max(0.0, float(-(positive * np.log(positive)).sum() / np.log(p.size)))


def may_stop(policy: ExitPolicy, answers: Sequence[np.ndarray]) -> bool:
    """Whether the last of the answers so far can be taken.

    Args:
        policy: of the model.
        answers: probabilities K of the exits reached so far, in order, at least one.

    Raises:
        InputError: no answer yet.
    """
    if not answers:
        raise InputError("there is no answer yet to stop at")
    if len(answers) > len(policy.blocks):
        return True
    if normalised_entropy(answers[-1]) < policy.entropy[len(answers) - 1]:
        return True
    recent = [int(np.argmax(answer)) for answer in answers[-policy.patience :]] if policy.patience else []
    return bool(recent) and len(recent) == policy.patience and len(set(recent)) == 1


def exit_names(policy: ExitPolicy | None) -> tuple[str, ...]:
    """What people call the exits, in order: ``block 6``, ``block 9``, ``end``.

    Nothing where there are none.
    """
    if policy is None:
        return ()
    return (*(f"block {block}" for block in policy.blocks), "end")


def stop_at(policy: ExitPolicy, answers_EK: np.ndarray) -> int:
    """Index of the exit whose answer is taken, where all are known.

    Args:
        policy: of the model.
        answers_EK: probabilities of every exit and of the classifier at the end.
    """
    return next(i for i in range(len(answers_EK)) if may_stop(policy, list(answers_EK[: i + 1])))


TOKENS_IN, TOKENS_OUT = "tokens_in", "tokens_out"
"""Names of what a stage takes from the one before and gives to the one behind."""
EXIT_NAME = "exit_index"
"""Name under which a chain says which exit answered: int64 of shape (1,), counted from 0, the end is the last."""
_STAGE = re.compile(r"stage([1-9][0-9]?)\.(.+)")


def stage_file(stage: int, name: str) -> str:
    """Name of a stage's file in the artefact.

    Args:
        stage: counted from 1.
        name: what the engine calls the file.
    """
    return f"stage{stage}.{name}"


def is_chain(names: Iterable[str]) -> bool:
    """Whether files with these names are a chain's."""
    return any(_STAGE.fullmatch(name) for name in names)


def split_files(files: Mapping[str, bytes], stages: int) -> list[dict[str, bytes]]:
    """An artefact's files, stage by stage, under the names their engine knows.

    Args:
        files: file name -> content.
        stages: how many there have to be.

    Raises:
        BundleError: a file belongs to no stage, or a stage is missing.
    """
    found: dict[int, dict[str, bytes]] = {}
    for name, content in files.items():
        matched = _STAGE.fullmatch(name)
        if matched is None:
            raise BundleError(f"the chain holds {name!r}, which belongs to no stage: export the bundle again")
        found.setdefault(int(matched[1]), {})[matched[2]] = content
    if sorted(found) != list(range(1, stages + 1)):
        there = ", ".join(str(number) for number in sorted(found))
        raise BundleError(f"the model has {stages} exits with its end, the chain has stages {there}: export it again")
    return [found[number] for number in sorted(found)]


class ChainEngine:
    """An engine made of engines, one per stage (see engine.Engine).

    Args:
        make: makes an engine that is not loaded yet.
        full_depth: never stop early; the answer is then the one at the end.
    """

    def __init__(self, make: Callable[[], Engine], *, full_depth: bool = False) -> None:
        self._make = make
        self._full_depth = full_depth
        self._stages: list[Engine] = []
        self._running: Engine | None = None
        self._cancelled = False
        self._spec: ModelSpec | None = None
        self.runs: list[int] = []
        """How often each stage has run since loading."""

    @property
    def executed(self) -> str:
        """What the first stage says it computes in, or empty."""
        return str(getattr(self._stages[0], "executed", "")) if self._stages else ""

    @property
    def description(self) -> str:
        """The stages' engine and how the chain is run, one line."""
        if not self._stages:
            return "chain, not loaded"
        how = "run to its end" if self._full_depth else "stopping early"
        return f"{self._stages[0].description}, chain of {len(self._stages)} stages {how}"

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Loads every stage; each gets the shape that the one before really gives.

        Raises:
            BundleError: the files are not the chain that the model's exits make.
            MissingExtra, UnsupportedError, EngineError: as the stages' engine.
        """
        if spec.exits is None:
            raise BundleError(f"model {spec.name!r} has no early exits, yet its artefact is a chain: export it again")
        takes, given = spec.input, np.zeros(spec.input.shape, np.uint8)
        self._spec = spec
        for content in split_files(files, len(spec.exits.blocks) + 1):
            engine = self._make()
            self._stages.append(engine)
            self.runs.append(0)
            engine.load(content, spec, replace(config, takes=takes))
            if len(self._stages) <= len(spec.exits.blocks):
                given = _tokens_of(engine.run(given))
                takes = TensorSpec(name=TOKENS_IN, dtype="float32", axes="BND", shape=given.shape)

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Computes one answer, no further than the policy asks.

        Args:
            tensor: uint8 NCHW.

        Returns:
            ``logits`` NK of the exit that answered, the auxiliary outputs of the stages that ran, and ``exit_index``.

        Raises:
            EngineError: a stage failed, or the run was cancelled.
        """
        policy = self._policy()
        answers: list[np.ndarray] = []
        found: dict[str, np.ndarray] = {}
        for index, outputs in enumerate(self._outputs(tensor)):
            found |= outputs  # the newest logits stay in the first place
            found[EXIT_NAME] = np.array([index], np.int64)
            logits = outputs[LOGITS_NAME]
            if not np.isfinite(logits).all():
                break  # what lies behind is computed from the same tokens; answer.py withdraws what is not finite
            answers.append(probabilities(logits[0]))
            if not self._full_depth and may_stop(policy, answers):
                break
        return found

    def run_all(self, tensor: np.ndarray) -> np.ndarray:
        """Logits of every exit, whatever the policy says.

        Args:
            tensor: uint8 NCHW.

        Returns:
            float32 1EK, owned by the caller.

        Raises:
            EngineError: a stage failed, or the run was cancelled.
        """
        return np.stack([outputs[LOGITS_NAME].copy() for outputs in self._outputs(tensor)], 1)

    def run_checked(self, tensor: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As ``run_all`` and ``run``, which have to tell the same.

        Args:
            tensor: uint8 NCHW.

        Returns:
            Logits of every exit, float32 1EK, and what ``run`` gives.

        Raises:
            EngineError: a stage failed, or the chain stopped where its rule does not, or with another answer.
        """
        logits_1EK, found = self.run_all(tensor), self.run(tensor)
        if not np.isfinite(logits_1EK).all():
            return logits_1EK, found
        index, last = int(found[EXIT_NAME][0]), len(self._stages) - 1
        answers_EK = np.stack([probabilities(logits_K) for logits_K in logits_1EK[0]])
        right = last if self._full_depth else stop_at(self._policy(), answers_EK)
        if index != right or not np.allclose(found[LOGITS_NAME], logits_1EK[:, index], rtol=1e-4, atol=1e-4):
            raise EngineError(f"the chain stopped at exit {index} with an answer that is not that of exit {right}")
        return logits_1EK, found

    def cancel(self) -> None:
        """Stops a run in progress, within the stage that runs or behind it."""
        self._cancelled = True
        running = self._running
        if running is not None:
            running.cancel()

    def close(self) -> None:
        """Frees every stage."""
        stages, self._stages = self._stages, []
        for engine in stages:
            engine.close()

    def _policy(self) -> ExitPolicy:
        if self._spec is None or self._spec.exits is None or not self._stages:
            raise EngineError("the chain is not loaded")
        return self._spec.exits

    def _outputs(self, tensor: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Outputs of one stage after another, without the tokens that go on to the next."""
        self._policy()
        assert self._spec is not None
        self._cancelled = False
        for index, engine in enumerate(self._stages):
            self._running = engine
            try:
                outputs = engine.run(tensor)
            finally:
                self._running = None
            self.runs[index] += 1
            if self._cancelled:
                raise EngineError("the run was cancelled between two stages")
            check_logits(outputs, self._spec)
            if index + 1 < len(self._stages):
                tensor = _tokens_of(outputs)
                del outputs[TOKENS_OUT]
            yield outputs


def _tokens_of(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the next stage is to take, float32 BND."""
    tokens_BND = outputs.get(TOKENS_OUT)
    if tokens_BND is None or tokens_BND.dtype != np.float32 or tokens_BND.ndim != 3:
        raise EngineError(f"a stage that is not the last gives no float32 {TOKENS_OUT}: export the bundle again")
    return np.ascontiguousarray(tokens_BND)


__all__ = [
    "EXIT_NAME",
    "TOKENS_IN",
    "TOKENS_OUT",
    "ChainEngine",
    "exit_names",
    "is_chain",
    "may_stop",
    "normalised_entropy",
    "split_files",
    "stage_file",
    "stop_at",
]
