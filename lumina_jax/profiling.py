"""Profiles of a few steps, on demand while a run goes on, or of steps named before.

    touch runs/tiny/profile             # the next ten steps
    echo 3 > runs/tiny/profile          # the next three
    --config.train.profile_steps=100,110

The request is looked for at each line of the log, and removed. Process 0 records what itself and
its own devices do, which in a run is what all do, so nothing has to be agreed on. What then lies in
<workdir>/profiles/<first step> can be read with TensorBoard and XProf.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Sequence

import jax
from absl import logging
from etils import epath

from lumina_jax import files

REQUEST = "profile"
_NUM_STEPS = 10  # of a request that does not say


class Profiler:
    """Told of every step that begins; records some.

    Args:
      workdir: Of the run.
      steps: (first, last + 1) to be recorded in any case, counted from 1; () for none.
    """

    def __init__(self, workdir: str, steps: Sequence[int] = ()):
        self._workdir = epath.Path(workdir)
        self._active = jax.process_index() == 0
        self._window = range(*steps) if steps else range(0)
        self._resources: contextlib.ExitStack | None = None  # of the recording under way

    def look_for_request(self, step: int) -> None:
        """Plans to record the steps after `step` where somebody asks for it."""
        if not self._active or self._resources or REQUEST not in files.sizes(self._workdir):
            return
        request = self._workdir / REQUEST
        text = request.read_text().strip() or str(_NUM_STEPS)
        request.unlink()
        if not text.isdecimal() or int(text) < 1:
            logging.warning(
                "%s held %r, which is no number of steps; nothing is recorded. Write a number of "
                "1 or more into it, or nothing for %d.", request, text[:40], _NUM_STEPS,
            )  # fmt: skip
            return
        self._window = range(step + 1, step + 1 + int(text))

    def is_due(self, step: int) -> bool:
        """Whether something is to be begun or ended before `step` begins."""
        return self._active and (step in self._window) != bool(self._resources)

    def switch(self, step: int) -> None:
        """Begins to record, or ends it, where that is due; the steps before must be done."""
        if self._resources:
            self.close()
        else:
            self._resources = contextlib.ExitStack()
            folder = pathlib.Path(self._resources.enter_context(tempfile.TemporaryDirectory()))
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow the loop down that it watches
            jax.profiler.start_trace(folder, profiler_options=options)
            self._resources.callback(self._keep, folder, self._workdir / "profiles" / str(step))

    def close(self) -> None:
        """Ends what is being recorded."""
        if self._resources:
            resources, self._resources = self._resources, None
            resources.close()

    def _keep(self, folder: pathlib.Path, target: epath.Path) -> None:
        jax.profiler.stop_trace()
        for path in folder.rglob("*"):
            if path.is_file():
                files.write(target / os.fspath(path.relative_to(folder)), path.read_bytes())
        logging.info("A profile is in %s.", target)
