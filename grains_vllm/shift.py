"""The normalised residual shift: the one formula that the server and the offline stage share."""

import torch

# Part of every steering digest: raise it whenever the numbers below change, so that KV blocks and
# artifacts scores computed with the older formula are never taken for the newer one's.
FORMULA_VERSION = 1


def shift(stream: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Adds `delta` to the residual stream and restores each token's norm (GrAInS, the shift step).

    u = h + delta;  h' = u * ||h|| / ||u||, in float32, norms over the last axis.

    Args:
        stream: h, the true residual stream after a decoder block, [..., hidden], any float dtype.
        delta: the summed strength * reference_norm * direction of every vector that steers the
            token, broadcastable to [..., hidden].

    Returns:
        h' in float32, [..., hidden]. A token whose u is exactly zero (delta = -h) keeps a zero
        vector, since no direction is left to scale.
    """
    h = stream.float()
    u = h + delta.float()
    # One reduction each and one rsqrt: the compiler fuses these with the norm that follows.
    ratio = h.square().sum(-1, keepdim=True) / u.square().sum(-1, keepdim=True).clamp_min(1e-30)
    return u * ratio.sqrt()
