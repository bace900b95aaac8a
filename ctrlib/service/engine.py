"""Requests waiting for the model: gathered into small batches under load, and a model that is swapped between two batches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.config import positive
from ctrlib.data.requests import Problem, Request
from ctrlib.ranking import TOLERANCE, Ranker
from ctrlib.schema import DataError
from ctrlib.service.metrics import Metrics

_log = logging.getLogger("ctrlib.service")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """
    Args:
        body_bytes: of a request.
        candidates: of a request.
        waiting: requests that wait for the model; more are answered 503. ``waiting_bytes``: of their bodies together, likewise.
        batch_requests: requests that go through the model together, at most.
        batch_rows: candidates of a request that may; larger ones go alone, where the context is computed once.
        seconds: until a request is answered 503 because the model did not come to it.
    """

    body_bytes: int = 4 << 20
    candidates: int = 10_000
    waiting: int = 1_000
    waiting_bytes: int = 256 << 20
    batch_requests: int = 32
    batch_rows: int = 32
    seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("body_bytes", "candidates", "waiting", "waiting_bytes", "batch_requests", "batch_rows", "seconds"):
            positive(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class Serving:
    """A model at work; ``version`` names it in every answer."""

    ranker: Ranker
    version: str


class RequestError(ValueError):
    """A request that cannot be read, field by field."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(p.message for p in problems))
        self.problems = tuple(problems)


class BusyError(RuntimeError):
    """Too many requests wait, or one waited too long."""


@dataclass(slots=True)
class _Waiting:
    context: Mapping[str, object]
    candidates: Sequence[Mapping[str, object]]
    answer: asyncio.Future[tuple[Serving, Floats]]


class Engine:
    """Scores requests in one thread, in the order in which they come.

    While the thread is busy, requests gather; then as many as ``limits`` allow go through the model together. Every batch is
    scored by one model from beginning to end, so that no answer mixes two of them.

    Args:
        path: of a run or artifact folder, or of a link to one: :meth:`reload` looks there again.
        limits: see :class:`Limits`.

    Raises:
        DataError, ConfigError: as :meth:`.Ranker.load`; or the model fails its check.
    """

    def __init__(self, path: str | Path, limits: Limits | None = None) -> None:
        self.path = Path(path)
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.serving = self._load(hoisting=False)  # at once; the graph takes seconds to make, and comes when it is there
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._held = 0  # bytes of bodies
        self._pool = ThreadPoolExecutor(1, "ctrlib-model")
        self._loader = ThreadPoolExecutor(1, "ctrlib-load")
        self._task: asyncio.Task[None] | None = None
        self._hoisting: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Requests that the model has not come to."""
        return self._queue.qsize()

    def start(self) -> None:
        """Begin; called in the event loop."""
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._run())
        self._hoisting = loop.create_task(self._hoist())

    async def stop(self) -> None:
        """Answer what is waiting, then end."""
        if self._task is not None:
            await self._queue.join()
            self._task.cancel()
        if self._hoisting is not None:
            self._hoisting.cancel()
        self._pool.shutdown()
        self._loader.shutdown()

    async def score(
        self, context: Mapping[str, object], candidates: Sequence[Mapping[str, object]], size: int = 0
    ) -> tuple[Serving, Floats]:
        """Probabilities, and the model that gave them. ``size``: bytes of the request, where they are known.

        Raises:
            RequestError: a field is absent, or a value cannot be what its field says.
            BusyError: see :class:`Limits`.
        """
        if self.waiting >= self.limits.waiting:
            raise BusyError(f"{self.limits.waiting} requests are waiting; try again later")
        if self._held + size > self.limits.waiting_bytes:
            raise BusyError(f"requests of {self._held:,} bytes are waiting; try again later")
        answer: asyncio.Future[tuple[Serving, Floats]] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Waiting(context, candidates, answer))
        self._held += size
        try:
            return await asyncio.wait_for(answer, self.limits.seconds)
        except TimeoutError as error:
            raise BusyError(f"no answer within {self.limits.seconds:g} s; try again later") from error
        finally:
            self._held -= size

    async def reload(self) -> str:
        """Load the artifact again, check it, and serve it from the next batch on. Requests go on meanwhile.

        Returns:
            Its version.

        Raises:
            DataError, ConfigError: it cannot be loaded or fails its check; the model that served before goes on.
        """
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._loader, self._load)
        except Exception as error:
            self.metrics.count("failed_reloads")
            _log.error("the model at %s is not served, the one before goes on: %s", self.path, error)
            raise
        self.serving = found
        self.metrics.count("reloads")
        _log.info("serving model %s", found.version)
        return found.version

    async def _hoist(self) -> None:
        """Serve a second copy of the model, which computes the context once. (A model cannot be exported while it scores.)"""
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._loader, self._load)
        except Exception as error:  # of a block of one's own, anything
            _log.warning("the context is computed for every candidate: %s", error)
            return
        if found.version == self.serving.version:
            self.serving = found
            _log.info("the context is computed once: %.0f%% of the multiplications", 100 * found.ranker.hoisted_share)

    def _load(self, *, hoisting: bool = True) -> Serving:
        ranker = Ranker.load(self.path.resolve(), hoisting=hoisting)  # what a link points to now, all its files
        worst = ranker.check()
        if not worst <= TOLERANCE:
            raise DataError(f"{self.path}: scores of its check differ by {worst:.1e}; expected at most {TOLERANCE:.0e}")
        return Serving(ranker, str(ranker.artifact.info.get("checksum", ranker.artifact.info["encoder_hash"]))[:12])

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self.limits.batch_requests and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            alive = [w for w in batch if not w.answer.done()]
            serving = self.serving
            try:
                answers = await loop.run_in_executor(self._pool, self._answers, serving, alive)
            except Exception as error:
                answers = [error] * len(alive)
            for waiting, answer in zip(alive, answers, strict=True):
                if waiting.answer.done():  # nobody waits for it any more
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result((serving, answer))
            for _ in batch:
                self._queue.task_done()

    @staticmethod
    def _problems(ranker: Ranker, waiting: _Waiting, error: DataError) -> Exception:
        try:
            problems = ranker.encoder.problems(waiting.context, waiting.candidates)
        except Exception as fault:
            return fault
        return RequestError(problems or [Problem("", str(error))])

    @staticmethod
    def _together(ranker: Ranker, requests: Sequence[Request]) -> list[Any]:
        if not requests:
            return []
        try:
            return list(ranker.score_together(requests))
        except Exception:  # of one of them; the others get their probabilities
            answers: list[Any] = []
            for request in requests:
                try:
                    answers.append(ranker.probabilities(request))
                except DataError as error:
                    answers.append(RequestError([Problem("", str(error))]))
                except Exception as error:
                    answers.append(error)
            return answers

    def _answers(self, serving: Serving, batch: Sequence[_Waiting]) -> list[Any]:
        ranker = serving.ranker
        answers: list[Any] = [None] * len(batch)
        together = []
        for at, waiting in enumerate(batch):
            try:
                request = ranker.encoder.encode(waiting.context, list(waiting.candidates))
                if len(batch) > 1 and 0 < len(request) <= self.limits.batch_rows:
                    together.append((at, request))
                else:
                    answers[at] = ranker.probabilities(request)
            except DataError as error:
                answers[at] = self._problems(ranker, waiting, error)
            except Exception as error:  # a fault of ours: it is this request's alone
                answers[at] = error
        for (at, _), answer in zip(together, self._together(ranker, [request for _, request in together]), strict=True):
            answers[at] = answer
        self.metrics.count("batches")
        self.metrics.count("candidates", sum(len(w.candidates) for w in batch))
        return answers
