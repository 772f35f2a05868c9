"""Which settings go together. What is wrong with a single one `parablock.config` finds by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.codec import GROUP
from parablock.privacy_settings import objection as privacy
from parablock.robust_settings import objection as robust
from parablock.secure_settings import objection as secure

if TYPE_CHECKING:
    from parablock.config import Config


def objection(config: Config) -> str | None:
    """Why these settings do not go together, and what to do; None if they do."""
    for looked_at in (
        _data,
        _quorum,
        _fedcybgd,
        _sampled,
        _solver,
        _lisa,
        _adaptive,
        robust,
        privacy,
        secure,
        _network,
    ):
        if (reason := looked_at(config)) is not None:
            return reason
    return None


def _data(config: Config) -> str | None:
    if config.blocks.num_blocks and config.blocks.max_block_mb:
        return "blocks.num_blocks and blocks.max_block_mb exclude each other; set one of them to 0"
    if config.partition.method in ("dirichlet", "field") and not config.partition.field:
        return (
            f"partition.method = {config.partition.method} divides rows by a field, and partition.field names none; "
            "name the one that labels your rows, as in --set partition.field=task"
        )
    return None


def _quorum(config: Config) -> str | None:
    if config.round.quorum > config.round.clients:
        return (
            f"round.quorum = {config.round.quorum} can never be reached with round.clients = {config.round.clients}; "
            "lower the quorum or expect more clients"
        )
    return None


def _solver(config: Config) -> str | None:
    if config.solver.momentum and config.solver.optimizer != "sgd":
        return (
            f"solver.momentum = {config.solver.momentum} is for sgd only, and solver.optimizer = "
            f"{config.solver.optimizer}; set solver.momentum to 0, or solver.optimizer to sgd"
        )
    return None


def _network(config: Config) -> str | None:
    if config.network.timeout_s <= 2 * config.network.heartbeat_s:
        return (
            f"network.timeout_s = {config.network.timeout_s} must be more than twice "
            f"network.heartbeat_s = {config.network.heartbeat_s}, or one late heartbeat ends a session"
        )
    if config.network.timeout_s < 2 * config.network.resend_s:
        return (
            f"network.timeout_s = {config.network.timeout_s} must be at least twice "
            f"network.resend_s = {config.network.resend_s}, or an upload is dropped before it was resumed; "
            "raise the one or lower the other"
        )
    if config.network.chunk_bytes % (4 * GROUP):
        return (
            f"network.chunk_bytes = {config.network.chunk_bytes} must be a multiple of {4 * GROUP}, "
            f"so that no group of {GROUP} values with a common scale is cut in two"
        )
    if config.network.window_bytes < config.network.chunk_bytes:
        return (
            f"network.window_bytes = {config.network.window_bytes} is smaller than one chunk "
            f"(network.chunk_bytes = {config.network.chunk_bytes}); raise it to at least one chunk"
        )
    return None


def _fedcybgd(config: Config) -> str | None:
    if config.mode != "fedcybgd":
        return None
    policy, order = config.round, config.schedule.order
    if policy.fraction < 1.0:
        return (
            f"round.fraction = {policy.fraction} has no meaning with mode = fedcybgd, in which one client trains "
            "in each round; set it to 1"
        )
    if policy.quorum > 1:
        return (
            f"round.quorum = {policy.quorum} can never be reached with mode = fedcybgd, in which one client trains "
            "in each round; set it to 1, or to 0"
        )
    if policy.late == "fold":
        return (
            "round.late = fold does not go with mode = fedcybgd, in which a round is one client's alone; "
            "set round.late to discard"
        )
    if order not in ("cyclic", "descending"):
        return (
            f"schedule.order = {order} does not go with mode = fedcybgd, in which each client trains each block once "
            "in a cycle of clients and blocks; set schedule.order to cyclic or descending"
        )
    return None


def _sampled(config: Config) -> str | None:
    policy = config.round
    drawn = config.drawn(policy.clients)
    if policy.quorum > drawn:
        return (
            f"round.quorum = {policy.quorum} is more than the {drawn} of round.clients = {policy.clients} that "
            f"round.fraction = {policy.fraction} draws for a round; lower the quorum or raise the fraction"
        )
    return None


def _lisa(config: Config) -> str | None:
    if config.mode != "lisa":
        return None
    for name, number in (("rounds", config.rounds), ("eval.every", config.eval.every)):
        if number % config.together:
            return (
                f"{name} = {number} must be even with mode = lisa, where two rounds exchange what was trained at once"
            )
    if config.round.fraction < 1.0:
        return (
            f"round.fraction = {config.round.fraction} does not go with mode = lisa, where a client trains two "
            "rounds at once, and would be drawn for each by itself; set it to 1"
        )
    if config.schedule.order == "importance":
        return (
            "schedule.order = importance does not go with mode = lisa, which draws its blocks; leave schedule.order out"
        )
    return None


def _adaptive(config: Config) -> str | None:
    if not config.solver.adaptive:
        return None
    low, steps, high = config.solver.min_steps, config.solver.steps, config.solver.max_steps
    if config.mode != "parablock":
        return (
            f"solver.adaptive needs an exchange that hides behind training, and mode = {config.mode} hides none; "
            "set solver.adaptive to false, or mode to parablock"
        )
    if low > high:
        return f"solver.min_steps = {low} is above solver.max_steps = {high}; lower the one or raise the other"
    if not low <= steps <= high:
        return (
            f"solver.steps = {steps}, with which solver.adaptive begins, must be from solver.min_steps = {low} "
            f"to solver.max_steps = {high}; move it there, or widen the bounds"
        )
    return None
