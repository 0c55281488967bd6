"""From one stage to the next: what a new run takes over, and what begins anew.

    weights    averaged or raw ones of another run's newest checkpoint, or published ones
    average    begins as those weights
    optimizer  fresh, or kept: moments, and the counts that belong to them
    schedule   of the learning rate: the new run's own, from its beginning
    data       the new run's own, from batch 0; the step is 0 too

Adam divides a moment by 1 - b^n, n being the updates that are in it, so n goes with the moments.
The schedule of the learning rate counts for itself (optax.ScaleByScheduleState), and starts again.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from lumina_jax import checkpoint, optim
from lumina_jax.errors import InputError
from lumina_jax.models.next_dit import NextDiTConfig
from lumina_jax.train_step import TrainState, init_state
from lumina_jax.weights.next_dit import Source, open_transformer

OPTIMIZERS = ("fresh", "kept")


def take_over(
    source: epath.PathLike,
    abstract: TrainState,
    shardings: TrainState,
    *,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    model: NextDiTConfig,
    config: dict,
    init_weights: str,
    init_optimizer: str,
) -> tuple[TrainState, str]:
    """The state before the first step of a new run, and what to say of it.

    Args:
      source: Workdir of the run before, or published weights.
      abstract: Shapes and types of the state.
      shardings: Where its arrays go.
      optimizer: Of the new run.
      learning_rate: Likewise, by step.
      model: Sizes of the network; those of `source` must be equal.
      config: Of the new run, to be compared.
      init_weights: "ema" or "params", of a workdir.
      init_optimizer: One of OPTIMIZERS.
    """
    directory, saved = check(
        source,
        abstract,
        model=model,
        config=config,
        init_weights=init_weights,
        init_optimizer=init_optimizer,
    )
    kept = None
    if saved is None:
        init_weights = "published"
        with _published(source, model) as found:
            weights = found.load(abstract.params, shardings.params)
    else:
        weights = checkpoint.load_params(
            directory, abstract.params, shardings.params, weights=init_weights
        )
        if init_optimizer == "kept":
            kept = checkpoint.load_part(
                directory, "opt_state", abstract.opt_state, shardings.opt_state
            )

    def make(weights, kept):
        state = init_state(weights, optimizer)
        return state if kept is None else state._replace(opt_state=resume(kept, state.opt_state))

    state = jax.jit(make, out_shardings=shardings)(weights, kept)
    return state, _report(
        directory, saved, init_weights, state, init_optimizer, learning_rate, config
    )


def check(
    source: epath.PathLike,
    abstract: TrainState,
    *,
    model: NextDiTConfig,
    config: dict,
    init_weights: str,
    init_optimizer: str,
) -> tuple[epath.PathLike, dict | None]:
    """Refuses what `take_over` cannot take over, by names and shapes; no array is read.

    The arguments are those of `take_over`.

    Returns:
      Where it lies, and what it says of itself unless it was published.
    """
    if not checkpoint.is_run(source):
        if init_optimizer == "kept":
            raise _no_moments(source)
        with _published(source, model) as found:
            found.check()
        return source, None
    directory = checkpoint.find(source)
    saved = checkpoint.load_meta(directory)
    checkpoint.check_same("model", saved["model"], _plain(model), directory)
    checkpoint.dtype_of(directory, init_weights)  # refuses a checkpoint without such weights
    if init_optimizer == "kept":
        _check_optimizer(directory, saved["config"], abstract.opt_state, config)
    return directory, saved


def resume(kept: Any, fresh: Any) -> Any:
    """The optimizer's state `kept`, but for the count of its schedule, which is that of `fresh`."""
    is_schedule = optim.is_schedule
    if not any(map(is_schedule, jax.tree.leaves(fresh, is_leaf=is_schedule))):
        raise ValueError(
            "No optax.ScaleByScheduleState: where does this optimizer count its steps?"
        )
    return jax.tree.map(
        lambda old, new: new if is_schedule(new) else old, kept, fresh, is_leaf=is_schedule
    )


@contextlib.contextmanager
def _published(source: epath.PathLike, model: NextDiTConfig) -> Iterator[Source]:
    """Published weights of these sizes, open."""
    # What a lone file does not tell is taken to be as here.
    known = {"patch_size": model.patch_size, "axes_dims": model.axes_dims}
    with open_transformer(source, **known) as found:
        checkpoint.check_same("model", _plain(found.cfg), _plain(model), epath.Path(source))
        yield found


def _plain(model: NextDiTConfig) -> dict:
    return checkpoint.plain(dataclasses.asdict(model))


def _check_optimizer(directory: epath.Path, saved: dict, abstract: Any, config: dict) -> None:
    """Refuses moments that are not those of this optimizer, by their places and shapes."""
    if "opt_state" not in checkpoint.parts(directory):
        raise _no_moments(directory)
    there, here = _shapes(checkpoint.parts(directory)["opt_state"]), _shapes(abstract)
    differing = [
        f"{path}: {there.get(path, 'absent')} there, {here.get(path, 'absent')} in this run"
        for path in sorted(there.keys() | here.keys())
        if there.get(path) != here.get(path)
    ]
    if differing:
        shown = differing[:4] + [f"and {len(differing) - 4} more"] * (len(differing) > 4)
        optim = [
            line for line in checkpoint.differences(saved, config) if line.startswith("optim.")
        ]
        raise InputError(
            f"config.train.init_optimizer=kept, but the moments in {directory} are of another kind "
            f"of optimizer: {'; '.join(shown)}. Settings that differ: "
            f"{'; '.join(optim) or 'none'}. Use the optimizer of that run, or "
            f"config.train.init_optimizer=fresh."
        )


def _no_moments(where: epath.PathLike) -> InputError:
    return InputError(
        f"config.train.init_optimizer=kept, but {where} holds weights alone, no moments. Name the "
        f"workdir of a run as config.train.init_from, or use config.train.init_optimizer=fresh."
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path; on the disk a named tuple is a dict, which gives it the same paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _report(
    directory: epath.PathLike,
    saved: dict | None,
    weights: str,
    state: TrainState,
    init_optimizer: str,
    learning_rate: optax.Schedule,
    config: dict,
) -> str:
    """A line for each part; `saved` is what the source says of itself, unless it was published."""
    title, optimizer = f"Hand-over from {directory}", "fresh: moments of zero"
    differing = ["published weights have none to compare with"]
    if saved:
        differing = checkpoint.differences(saved["config"], config) or ["the same"]
        if saved["data"] is None:
            title += ", weights alone"
        else:
            title += f", step {directory.name} of {saved['config']['train']['num_steps']}"
    if init_optimizer == "kept":
        leaves = jax.tree.leaves(state.opt_state)
        counts = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.integer)]
        moments = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        updates = max(int(count) for count in counts)  # that of the schedule is zero
        optimizer = f"kept: {_describe(moments)}; of {updates} updates"
    lines = {
        "weights": f"{weights}: {_describe(state.params)}",
        "average": "begins as these weights",
        "optimizer": optimizer,
        "schedule": f"from its beginning: learning rate {float(learning_rate(0)):.3g} at step 0",
        "data": "from batch 0; the step is 0",
        "config": f"\n  {'':11}".join(differing),
    }
    return "\n".join([f"{title}:", *(f"  {name:<11}{text}" for name, text in lines.items())])


def _describe(tree: Any) -> str:
    leaves, norm = jax.tree.leaves(tree), jax.jit(optax.tree.norm)(tree)
    size = sum(leaf.size for leaf in leaves)
    return f"{len(leaves)} arrays, {size:,} numbers, norm {float(norm):.6g}"
