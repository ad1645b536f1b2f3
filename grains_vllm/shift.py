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
    h, d = stream.float(), delta.float()
    # Two sums side by side, which the compiler fuses with the norm that follows. d + h has the bits
    # of h + d but is another expression to it: used twice, u would be written to memory and read
    # back, in float32; it costs less to add up again.
    ratio = h.square().sum(-1, keepdim=True) / (d + h).square().sum(-1, keepdim=True).clamp_min(
        1e-30
    )
    return (h + d) * ratio.sqrt()
