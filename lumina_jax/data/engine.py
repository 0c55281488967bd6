"""Where the tasks of preparing data run: here, in processes of this machine, or on Apache Beam.

A task must be safe to run twice: whoever is killed begins again with the same tasks, and Beam tries
those again that fail.
"""

import multiprocessing
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lumina_jax.errors import InputError

# progress(description, total) -> a context that gives advance(done)
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def _silent(description: str, total: int) -> Iterator[Callable[[int], None]]:
    del description, total
    yield lambda done: None


class Engine:
    """Runs tasks in this process, one after another."""

    def __init__(self, progress: Progress = _silent):
        self._progress = progress

    def run(self, description: str, function: Callable[[Any], None], tasks: Sequence[Any]) -> None:
        """Calls the function with each task; returns when all are done."""
        with self._progress(description, len(tasks)) as advance:
            self._run(function, tasks, advance)

    def _run(
        self,
        function: Callable[[Any], None],
        tasks: Sequence[Any],
        advance: Callable[[int], None],
    ) -> None:
        for done, task in enumerate(tasks, start=1):
            function(task)
            advance(done)


class Processes(Engine):
    """Runs tasks in several processes of this machine."""

    def __init__(self, num_workers: int, progress: Progress = _silent):
        if num_workers < 1:
            raise InputError(f"num_workers={num_workers} must be 1 or more.")
        super().__init__(progress)
        self._num_workers = num_workers

    def _run(self, function, tasks, advance) -> None:
        # Fresh processes: a fork of one that has threads may hang.
        context = multiprocessing.get_context("spawn")
        workers = min(self._num_workers, len(tasks)) or 1
        pool = futures.ProcessPoolExecutor(workers, context, _end_with, (os.getpid(),))
        try:
            running = [pool.submit(function, task) for task in tasks]
            for done, finished in enumerate(futures.as_completed(running), start=1):
                finished.result()
                advance(done)
        except BrokenProcessPool as error:
            raise InputError(
                "A worker was killed, perhaps because memory ran out. What is done is kept: give "
                "the same command again, with fewer --num_workers."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class Beam(Engine):
    """Runs tasks as a pipeline of Apache Beam.

    Args:
        options: of the pipeline, such as "--runner=DataflowRunner --project=...". Without a runner
            it is Beam's DirectRunner, on this machine.
        progress: for the pipeline as a whole; the runner has a page of its own for the rest.
    """

    def __init__(self, options: str = "", progress: Progress = _silent):
        super().__init__(progress)
        self._options = shlex.split(options)

    def _run(self, function, tasks, advance) -> None:
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise InputError(
                "Apache Beam is not installed. It needs an environment of its own, because it asks "
                "for an older protobuf: python -m venv beam; beam/bin/pip install "
                "'lumina-jax[beam]'"
            ) from error
        with beam.Pipeline(options=PipelineOptions(self._options)) as pipeline:
            _ = (
                pipeline
                | beam.Create(tasks)
                | beam.Reshuffle()  # else one worker would do all that follows a Create
                | beam.Map(function)
            )
        advance(len(tasks))


def in_threads(
    function: Callable[[Any], Any], arguments: Sequence[Any], ahead: int = 128
) -> Iterator[Any]:
    """Yields the results in order, a few ahead: most of each call is waiting for a store."""
    with futures.ThreadPoolExecutor(min(ahead, 32)) as pool:
        for start in range(0, len(arguments), ahead):
            yield from pool.map(function, arguments[start : start + ahead])


def _end_with(parent: int) -> None:
    """Ends this worker when its parent is gone, even if that was killed."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
