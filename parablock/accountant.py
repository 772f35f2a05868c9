"""The accountant: what epsilon a client's data have cost after so many rounds. Nobody is protected by it; it counts.

A round in which a client takes part tells its delta of one block, cut to the norm S, with Gaussian noise of z·S: by
itself (the local place), or in a sum to which the client adds at most S (the central one). That is the Gaussian
mechanism with noise multiplier z. Two worlds are told apart that differ in one client: in one of them all of its deltas
are nothing. (δ, ε) is the best that is true of that (add-or-remove, by zeroing out; Kairouz et al., arXiv 2102.06387).

    rounds     T rounds are T mechanisms on the same data, each chosen with what the earlier ones have told: every
               round trains on all of the client's rows, whichever block it trains. Blocks are not parts of the data,
               so that nothing is gained by rounds that train different ones (no parallel composition). T Gaussian
               mechanisms of z are one of z / √T, exactly (Dong, Roth, Su, arXiv 1905.02383, corollary 3.3)
    sampling   who is drawn for a round follows from the run's seed, which every client is told: to whoever knows it
               the draw hides nothing, so that it amplifies nothing. A round counts for those who take part in it
    steps, rows, codecs, server optimizers
               change nothing: the whole delta is cut, whatever has made it, and what is done to a noisy value later
               tells no more than the value did (post-processing)

ε is worked out by `dp-accounting` from the privacy loss distribution, from above (connect-the-dots, Doroshenko et al.,
arXiv 2207.04380).
"""

from __future__ import annotations

import functools
import math

POINTS = 8192
"""Of the privacy loss distribution. Up to ε = 150, ε is at most 1e-3 too high with it, and takes 12 ms."""

_HOPELESS = 200.0
"""√T / z beyond which ε is above 20,000."""

INSTALL = "differential privacy needs the package dp-accounting: pip install -c constraints.txt -e '.[privacy]'"


class NoAccountantError(ImportError):
    """What works ε out is not installed. The message says how to install it."""


def epsilon(noise: float, rounds: int, delta: float) -> float:
    """ε at δ = `delta` after so many rounds of one client with noise multiplier `noise`; inf where it is beyond 20,000.

    Raises NoAccountantError.
    """
    return epsilon_of(math.sqrt(rounds) / noise, delta)


@functools.lru_cache(maxsize=4096)
def epsilon_of(apart: float, delta: float) -> float:
    """The same where the two worlds are so many standard deviations apart: √(Σ 1/z²) over the rounds, each with its z.

    Raises NoAccountantError.
    """
    if apart == 0.0:
        return 0.0
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ImportError as error:
        raise NoAccountantError(INSTALL) from error
    if apart > _HOPELESS:
        return math.inf
    interval = (apart * apart / 2.0 + 12.0 * apart) / POINTS  # the losses' mean is apart² / 2, their deviation apart
    made = privacy_loss_distribution.from_gaussian_mechanism(1.0 / apart, value_discretization_interval=interval)
    return float(made.get_epsilon_for_delta(delta))


def most_rounds(noise: float, delta: float, budget: float, bound: int) -> int:
    """The largest number of rounds, up to `bound`, after which ε is not above `budget`; 0: not even after one.

    Raises NoAccountantError.
    """
    fits, beyond = 0, 1
    while beyond <= bound and epsilon(noise, beyond, delta) <= budget:
        fits, beyond = beyond, 2 * beyond
    beyond = min(beyond, bound + 1)
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if epsilon(noise, middle, delta) <= budget:
            fits = middle
        else:
            beyond = middle
    return fits
