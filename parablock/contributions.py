"""A worker's contributions: what it has trained and the broker may not have, kept until the round is closed.

Where late ones may count in a later round (`keeps_late`), they are kept until the broker has said what became of them,
and leave after those that are in time. What an earlier process has kept is as good as what this one has trained.

Sends each within its credit, sends again what was not confirmed, and remembers for which rounds the worker has nothing
to give. What the broker counts it says by commits, which are the participant's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parablock.messages import Abstain, Chunk, Credit, Offer
from parablock.participant_events import Deferred, Dismissed, Settled, Uploaded
from parablock.transfer import Outgoing, Payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from parablock.messages import FromWorker
    from parablock.participant_events import Held
    from parablock.transfer import Encoded
    from parablock.wire import Buffer

    Say = Callable[[FromWorker, Buffer | None], None]


@dataclass
class _Upload:
    """A contribution. outgoing: its transfer in the present session. late: its round is closed. Times in seconds."""

    offer: Offer
    payload: Payload
    outgoing: Outgoing
    began: float
    progress_at: float
    uploaded: bool = False  # the broker has said that it holds all of it
    late: bool = False
    dismissed: bool = False  # it is known not to have counted in its round
    deferred: bool = False  # the broker has said that it may count late

    @property
    def unanswered(self) -> bool:
        """Whether the broker owes us a word on it."""
        return self.late or not self.outgoing.done


class Contributions:
    """say: sends a message, with its payload. emit: asks for an effect."""

    def __init__(self, say: Say, emit: Callable[[Dismissed | Uploaded | Deferred | Settled], None]) -> None:
        self.keeps_late = False
        self._say = say
        self._emit = emit
        self._window_bytes = 0  # until the first offer
        self._uploads: dict[int, _Upload] = {}  # by round
        self._unsettled: set[int] = set()  # rounds of which we do not know whether we were counted
        self._withheld: dict[int, Abstain] = {}  # by round
        self._passed = 0  # rounds before it will not be trained by us any more
        self._made_before: set[int] = set()  # rounds in which what an earlier process of ours had made has counted

    @property
    def position(self) -> int:
        """The first round that was neither trained nor passed."""
        return self._passed

    def restore(self, held: Iterable[Held], position: int, window_bytes: int, now: float) -> None:
        """Take over what an earlier process has kept; it is offered after the next start."""
        self._passed = position
        self._window_bytes = window_bytes
        for each in sorted(held, key=lambda each: each.offer.round):
            assert each.payload.complete, f"of the contribution to round {each.offer.round} a part was kept"
            assert each.offer.round < position, f"a contribution to round {each.offer.round}, kept at {position}"
            outgoing = Outgoing(each.payload, 0)
            self._uploads[each.offer.round] = _Upload(each.offer, each.payload, outgoing, now, now)
            self._unsettled.add(each.offer.round)

    def offer(self, offer: Offer, payload: Payload, window_bytes: int, now: float, *, live: bool) -> None:
        """A round was trained. live: the broker listens; else it is offered after the next start."""
        self._keep(offer, payload, window_bytes, now, live=live, late=False)
        self._unsettled.add(offer.round)

    def late(self, offer: Offer, payload: Payload, window_bytes: int, now: float, *, live: bool) -> None:
        """A round was trained that had been closed by then: the broker hears of it, and may still want it."""
        if offer.round in self._made_before:
            self._passed = max(self._passed, offer.round + 1)
            self._emit(Dismissed(offer.round, "what an earlier process of this worker had made for it has counted"))
            return
        self._emit(Dismissed(offer.round, "the round was closed before the contribution was ready"))
        if self.keeps_late:
            self._keep(offer, payload, window_bytes, now, live=live, late=True)
        else:
            self._passed = max(self._passed, offer.round + 1)
            if live:
                self._say(offer, None)

    def _keep(self, offer: Offer, payload: Payload, window_bytes: int, now: float, *, live: bool, late: bool) -> None:
        self._passed = max(self._passed, offer.round + 1)
        self._window_bytes = window_bytes
        upload = _Upload(offer, payload, Outgoing(payload, window_bytes), now, now, late=late, dismissed=late)
        self._uploads[offer.round] = upload
        if live:
            self._repeat(upload, now)

    def ready(self, round: int, chunk: Encoded, now: float, *, live: bool) -> None:
        """The next chunk of a contribution is encoded."""
        upload = self._uploads.get(round)
        if upload is None:
            return  # the round was closed meanwhile
        upload.payload.append(chunk)
        if live:
            upload.progress_at = now
            self._pump()

    def mask(self, round: int, now: float, *, live: bool) -> None:
        """The contribution to a round can be encoded from now on."""
        upload = self._uploads.get(round)
        if upload is not None and live:
            self._repeat(upload, now)

    def unmask(self) -> None:
        """What was encoded is of no use to another broker: it will be encoded anew."""
        for upload in self._uploads.values():
            upload.payload = Payload(upload.payload.nbytes, upload.payload.chunk_bytes)
            upload.outgoing = Outgoing(upload.payload, 0)

    def holds(self, round: int) -> bool:
        """Whether there is a contribution to a round, which may still be of use."""
        return round in self._uploads

    def withheld(self, round: int) -> str | None:
        """Why there is nothing to give to a round; None if there may be."""
        return self._withheld[round].reason if round in self._withheld else None

    def withdraw(self, abstain: Abstain, told: int, *, live: bool) -> None:
        """Nothing is to be given to a round for which the worker has trained, or may be about to."""
        self._uploads.pop(abstain.round, None)
        if abstain.round in self._unsettled:
            self._unsettled.remove(abstain.round)
            self._emit(Dismissed(abstain.round, abstain.reason))
        self._withhold(abstain, told, live=live)

    def withhold(self, abstain: Abstain, told: int, *, live: bool) -> None:
        """A round was trained to no use. told: the first round that is not known to be committed."""
        self._passed = max(self._passed, abstain.round + 1)
        self._withhold(abstain, told, live=live)

    def _withhold(self, abstain: Abstain, told: int, *, live: bool) -> None:
        if abstain.round >= told:
            self._withheld[abstain.round] = abstain
            if live:
                self._say(abstain, None)

    def passed(self, round: int) -> None:
        """A round was not for us to train, and will not be trained by us later."""
        self._passed = max(self._passed, round + 1)

    def start(self, round: int, next_round: int, told: int, now: float) -> None:
        """A session has started at `round`: offer what the broker may not have, and find what it need not wait for.

        next_round: the first round that the broker had not committed.
        """
        self.forget(next_round)
        self._unsettled = {unsettled for unsettled in self._unsettled if unsettled >= next_round}
        for upload in self._uploads.values():
            upload.outgoing = Outgoing(upload.payload, 0)  # no chunk yet: the answer says how much the broker holds
            upload.progress_at = now
            self._say(upload.offer, None)
        for passed in range(round, self._passed):
            if passed not in self._uploads and passed >= told:
                self._withheld.setdefault(passed, Abstain(passed, "the worker had gone on to later rounds"))
        self._passed = max(self._passed, round)

    def credit(self, credit: Credit, now: float) -> None:
        """Raises TransferError for an impossible one.

        That it holds all of one which is not even made yet the broker says where an earlier process of ours has sent
        one: that counts, and this one need not be sent.
        """
        upload = self._uploads.get(credit.round)
        if upload is None or (upload.offer.block, 0) != (credit.block, credit.attempt) or upload.outgoing.done:
            return
        if not upload.payload.complete and credit.held == credit.until == upload.outgoing.nbytes:
            upload.outgoing.settle()
        elif upload.outgoing.credit(credit.held, credit.until):
            upload.progress_at = now
        if upload.outgoing.done and not upload.uploaded and not upload.late:
            upload.uploaded = True
            self._emit(Uploaded(credit.round, upload.began, now))
        self._pump()

    def committed(self, round: int, *, counted: bool) -> None:
        """The round is closed, and so are those before it."""
        if counted:
            if round >= self._passed:
                self._made_before.add(round)
            self._uploads.pop(round, None)
            self._unsettled.discard(round)
        self.forget(round + 1)
        if round in self._unsettled:
            self._unsettled.remove(round)
            self._emit(Dismissed(round, "the round was closed without it"))
            if round in self._uploads:
                self._uploads[round].dismissed = True

    def deferred(self, round: int, into: int, now: float) -> None:
        """The broker takes a late contribution, or has counted it in the round `into`."""
        upload = self._uploads.get(round)
        if upload is None:
            return  # said again
        if into >= 0:
            del self._uploads[round]
            self._unsettled.discard(round)
            self._emit(Settled(round, into, ""))
        elif not upload.deferred:
            upload.late = upload.dismissed = upload.deferred = True
            self._emit(Deferred(round))
            upload.outgoing.rewind()  # what came while the round was being closed was not taken
            self._repeat(upload, now)

    def forget(self, next_round: int) -> None:
        """Let go of what was kept for rounds before it; but for contributions that may count late."""
        for number in [number for number in self._uploads if number < next_round]:
            if self.keeps_late:
                self._uploads[number].late = True
            else:
                del self._uploads[number]
        for number in [number for number in self._withheld if number < next_round]:
            del self._withheld[number]

    def dismiss(self, round: int, reason: str) -> None:
        """The broker does not count our contribution to `round`, if there was one that we believed in."""
        upload = self._uploads.pop(round, None)
        if round in self._unsettled:
            self._unsettled.remove(round)
            self._emit(Dismissed(round, reason))
        elif upload is not None and upload.dismissed:
            self._emit(Settled(round, -1, reason))

    def abstain(self) -> None:
        """Say again to which rounds there is nothing to give."""
        for abstain in self._withheld.values():
            self._say(abstain, None)

    def stalled_at(self, resend_s: float) -> float:
        """When the first contribution that is on its way will have made no progress for `resend_s`, or it is to be
        asked what became of a late one; infinite where there is none."""
        due = math.inf
        for upload in self._uploads.values():
            if upload.progress_at < due and upload.unanswered:
                due = upload.progress_at
        return due + resend_s

    def resend(self, resend_s: float, now: float) -> None:
        """Send again what was not confirmed for that long."""
        for upload in self._uploads.values():
            if upload.unanswered and now >= upload.progress_at + resend_s:
                upload.outgoing.rewind()
                self._repeat(upload, now)

    def _repeat(self, upload: _Upload, now: float) -> None:
        upload.progress_at = now
        self._say(upload.offer, None)
        self._pump()

    def _pump(self) -> None:
        """Send what is ready, earlier rounds first, as they are needed first, but late ones last; a window at most is
        under way."""
        room = self._window_bytes - sum([upload.outgoing.under_way for upload in self._uploads.values()])
        for upload in sorted(self._uploads.values(), key=lambda upload: upload.late):
            for offset, chunk in upload.outgoing.due(room):
                room -= chunk.payload.nbytes
                header = Chunk(upload.offer.round, upload.offer.block, 0, offset, chunk.checksum)
                self._say(header, chunk.payload)
