"""The loss on held-out pictures, at fixed times and with fixed noise.

As MLPerf Training does for FLUX (mlcommons/training, text_to_image, section 5, after Esser et al.,
Scaling rectified flow transformers, 2024): record i is seen at one of eight equidistant times,
number i mod 8, and the result is the mean over times of the mean over the records of each. MLPerf's
times are 0, 1/8, ... 7/8 of the way to noise; here they are the middles of eight equal parts,
t = (k + 1/2) / 8, as in torchtitan, because a picture without any noise says nothing of the noise
to be named.

The noise of a record follows from its number alone, its caption is always the same one, and none is
dropped. So neither mesh, processes, batch size nor the run's seed change the result beyond
rounding, and runs can be compared by it.

Axes: B batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from lumina_jax import flow, sharding
from lumina_jax.data.loader import Loader
from lumina_jax.frozen.encoder import Encoder
from lumina_jax.types import Batch, ImageTokens


class Validator:
    """validator(ema, params) -> scalars.

    Args:
      forward: forward(params, image, t, cap_feats, cap_mask) -> velocity of each token.
      encode: Makes batches of held-out records, of `batch_size` rows.
      loader: Has the records.
      mesh: The batch is split over it.
      batch_size: Over all devices.
      num_times: Number of the fixed times.
    """

    def __init__(
        self,
        forward: Callable,
        encode: Encoder,
        loader: Loader,
        *,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        num_times: int,
    ):
        self._encode, self._loader = encode, loader
        self._batch_size, self._num_times = batch_size, num_times
        self._split = sharding.named(mesh, ("act_batch",))

        def losses(params, batch, index):
            return index, *record_losses(forward, params, batch, index, num_times=num_times)

        self._losses = jax.jit(losses, out_shardings=sharding.named(mesh, ()))

    def __call__(self, ema: Any, params: Any) -> dict[str, float]:
        """The losses of the averaged weights, and of the raw ones as `..._raw`, by time too."""
        found: dict[str, list] = {}  # by name, (indices, losses) of each batch
        for host_batch in self._loader.held_out_batches(self._batch_size):
            index = host_batch.pop("index")
            index = jax.make_array_from_process_local_data(self._split, index, (self._batch_size,))
            batch = self._encode(host_batch, 0)
            for suffix, weights in (("", ema), ("_raw", params)):
                numbers, *losses = (
                    np.asarray(x.addressable_data(0)) for x in self._losses(weights, batch, index)
                )
                for name, values in zip(("loss", "auxiliary_loss"), losses, strict=False):
                    found.setdefault(f"validation_{name}{suffix}", []).append((numbers, values))
        scalars = {}
        for name, pairs in found.items():
            index, losses = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
            scalars |= mean_over_times(name, index, losses, self._num_times)
        return scalars


def record_losses(
    forward: Callable,
    params: Any,
    batch: Batch,
    index: Int32[Array, " B"],
    *,
    num_times: int,
) -> list[Float[Array, " B"]]:
    """The loss of each picture, and of its pooled copy where there is one."""
    number = jnp.maximum(index, 0)  # of what only fills up a batch nobody asks
    t = (number % num_times + 0.5) / num_times

    def losses(image: ImageTokens, key: PRNGKeyArray):
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, number)
        noise = jax.vmap(lambda k: jax.random.normal(k, image.tokens.shape[1:]))(keys)
        noise = sharding.constrain(noise, ("act_batch",))
        x_t = image._replace(tokens=flow.interpolate(image.tokens, noise, t))
        velocity = forward(params, x_t, t, batch.cap_feats, batch.cap_mask)
        return flow.loss(velocity, image.tokens, noise, image.mask)

    pictures = [image for image in (batch.image, batch.pooled) if image is not None]
    # Not the run's key: runs of other seeds are asked the same.
    keys = jax.random.split(jax.random.key(0), 2)
    return [losses(image, key) for image, key in zip(pictures, keys, strict=False)]


def mean_over_times(
    name: str, index: Int32[np.ndarray, " n"], losses: Float[np.ndarray, " n"], num_times: int
) -> dict[str, float]:
    """`name`, the mean over times, and `name/t0` ..., 0 at noise, each a mean over its records.

    Rows with index -1 are nobody's. A time whose records are all damaged is left out.
    """
    # In the order of the records: the sum must not depend on how they were batched.
    order = np.argsort(index, kind="stable")
    order = order[index[order] >= 0]
    index, losses = index[order], losses[order].astype(np.float64)
    means = {
        f"{name}/t{k}": float(losses[index % num_times == k].mean())
        for k in range(num_times)
        if np.any(index % num_times == k)
    }
    return {name: float(np.mean(list(means.values()))), **means}
