"""Conduct: how much each peer may say, who has broken the protocol how often, and what of that is told.

It counts and answers; what is done about who says too much, or has broken the protocol, is `parablock.coordinator`'s
business. A peer is known by its client's name where its connection proves one, and else by its address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from parablock.offences import Offences
from parablock.quota import Quotas
from parablock.tally import Tally

if TYPE_CHECKING:
    from parablock.config import Config
    from parablock.manifest import Manifest
    from parablock.messages import Message
    from parablock.offences import Offence
    from parablock.quota import Holder
    from parablock.sessions import Session

_TELL_ALL = 100
"""Of a client's comings and goings so many are told one by one, or eight for each client that the run awaits where that
is more; those whose name nothing proves count together."""


class Conduct:
    """client, wherever it is asked for: whose key the connection has; None: it has none. Times in seconds."""

    def __init__(self, config: Config, manifest: Manifest) -> None:
        self._quotas = Quotas(config, manifest)
        self._offences = Offences()
        self._comings = Tally(max(_TELL_ALL, 8 * config.round.clients))

    def excess(self, peer: bytes, client: str | None, message: Message, now: float) -> str | None:
        """Count a message; why it is one too many, or None."""
        return self._quotas.spend(_holder(peer, client), message, now)

    def excess_of_probes(self, peer: bytes, client: str | None, nbytes: int, now: float) -> str | None:
        """Count a probe of so many bytes, up and down; why it is too many, or None."""
        return self._quotas.spend_probe(_holder(peer, client), nbytes, now)

    def took_chunk(self, session: Session) -> None:
        """The chunk that was counted last is part of a transfer."""
        self._quotas.took_chunk(_holder(session.peer, session.client))

    def sent_chunk(self, session: Session) -> None:
        """A chunk of a block was sent, and is to be answered."""
        self._quotas.sent_chunk(_holder(session.peer, session.client))

    def sent_commit(self, session: Session) -> None:
        """A round was closed, and the session is told."""
        self._quotas.sent_commit(_holder(session.peer, session.client))

    def barred_s(self, client: str | None, now: float) -> float:
        """For how long a client is not let in from now on; 0.0: it is."""
        return self._offences.barred_s(client, now)

    def offend(self, name: str, reason: str, now: float, *, proven: bool) -> tuple[Offence, str]:
        """Somebody has broken the protocol; and what is said of that. proven: the connection says whose name it is."""
        offence = self._offences.add(name, now, proven=proven)
        text = f"broke the protocol: {reason}"
        if offence.number > 1:
            text += f"; {'its ' if proven else ''}offence number {offence.number}"
            text += "" if proven else " of those without a key"
        if offence.barred_s:
            text += f"; not let in for {offence.barred_s:g} s"
        return offence, text

    def forget(self, client: str) -> None:
        """Who comes under this name from now on is another one."""
        self._offences.forget(client)

    def tell(self, session: Session, text: str, now: float) -> tuple[bool, str]:
        """A session has come or gone: whether that is worth a line in the record, and what it says."""
        number = self._comings.add(session.client or "", now)
        if number > self._comings.tell_all:
            text += f"; number {number} of such events, of which few are told"
        return self._comings.tells(number), text


def _holder(peer: bytes, client: str | None) -> Holder:
    """Whose quota it is."""
    return peer if client is None else client
