"""Networks for the tests of the sampler: any function of tokens, in the pieces of the real one."""

import jax.numpy as jnp

from lumina_jax.models.next_dit import Joined, Stages


def whole(forward) -> Stages:
    """`forward(params, image, t, cap_feats, cap_mask) -> tokens`, all of it in the layers."""

    def join(params, image, t, caption, cap_mask):
        del params
        return Joined(
            xs=(image.tokens,),
            segment_ids=(image.mask.astype(jnp.int32),),
            freqs=(),
            modulations=(),
            conds=((image, t, caption, cap_mask),),
        )

    return Stages(
        refine=lambda params, cap_feats, cap_mask: cap_feats,
        join=join,
        first_input=lambda params, joined: joined.xs[0],
        attend=lambda params, joined, height, width, merging: forward(params, *joined.conds[0]),
        predict=lambda params, x, joined, num_slots: x,
    )
