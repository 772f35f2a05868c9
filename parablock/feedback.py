"""Error feedback: what a lossy codec rounds away is kept and added to what is sent of the same block next.

    send  q = encode(v + e),   keep  e ← (v + e) − decode(q)

(Seide et al. 2014; Karimireddy et al., arXiv 1901.09847.) A client keeps a residual per block for its contributions,
the broker one per block for the way down. A lossless codec has nothing to keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from parablock.codec import Codec
    from parablock.wire import Buffer

    Vector = npt.NDArray[np.float32]


def encode(codec: Codec, values: Vector, residual: Vector | None) -> tuple[Buffer, Vector]:
    """(payload of values + residual, what it decodes to); the residual is moved on in place.

    residual: of the shape of `values`, or None to keep nothing of what is lost.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # whoever reads it sees what is not finite
        wanted = values if residual is None else values + residual
        payload = codec.encode(wanted)
        said = codec.decode(payload, wanted.size)
        if residual is not None:
            np.subtract(wanted, said, out=residual)
            known = np.isfinite(residual)
            if not known.all():  # it will be refused where it arrives; kept, it would spoil all that follows
                residual[~known] = 0.0
    return payload, said
