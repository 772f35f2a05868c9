"""The participant: the worker's half of the protocol, as a state machine `(event, now) → effects`.

It knows what the broker has committed and what has arrived, sends contributions within their credit, and says which
round may be trained. It opens no socket, reads no clock and touches no model: `workers` performs its effects.

Contributions are kept until their round is closed, and partly received blocks until they are superseded, so that a
new greeting costs only what was not yet confirmed. A worker that was ended and begins again with what it has kept
(`Kept`) goes on as if it were the same process.

Its states, and what the broker may say in which, are in `parablock.conversation`, when it calls and when it gives up in
`parablock.patience`, what goes up in `parablock.contributions`, what comes down in `parablock.arrivals`, what rounds
ahead are in `parablock.agenda`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from parablock import config as settings
from parablock.agenda import Turn, Turns
from parablock.arrivals import Arrivals
from parablock.contributions import Contributions
from parablock.conversation import EXPECTED, State
from parablock.layout import Layout
from parablock.messages import (
    PROTOCOL,
    Abstain,
    Chunk,
    Commit,
    Credit,
    Dealt,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Join,
    Late,
    Leave,
    Offer,
    Refused,
    Rejected,
    Rejoin,
    Roll,
    Start,
    Stopped,
    Terms,
    Unmask,
    Waiting,
    Welcome,
)
from parablock.participant_events import (
    Contribute,
    Denied,
    Effect,
    End,
    Event,
    Fetched,
    Finish,
    Gone,
    Kept,
    Notice,
    OnDisk,
    Prepare,
    Prepared,
    Progress,
    Ready,
    Received,
    Say,
    Send,
    SitOut,
    Started,
    Tick,
    Wait,
    Withdraw,
    Withhold,
)
from parablock.patience import Patience
from parablock.transfer import Payload, TransferError
from parablock.wire import Buffer, Envelope

if TYPE_CHECKING:
    from parablock.config import Config
    from parablock.memberships import Memberships


class Participant:
    """See the module. patience_s: silence of the broker after which the worker gives up.

    run: the only one that it takes part in; "": whichever the broker serves.
    """

    def __init__(self, name: str, session: str, patience_s: float, now: float, run: str = "") -> None:
        self.state = State.CALLING
        self._invited_to = run
        self._name = ""  # what the broker calls us
        self._hello = Hello(name, session, PROTOCOL)
        self._patience = Patience(patience_s, session, now)
        self._run = ""
        self._epoch = 0
        self._settings = ""  # as the broker has said them last
        self._prepared: Prepared | None = None
        self._arrivals = Arrivals(self._send, self._emit)
        self._begun = False  # there is a position to go on from
        self._contributions = Contributions(self._send, self._emit)
        self._sums: Memberships | None = None  # where contributions are masked
        self._start: Start | None = None
        self._turns: Turns | None = None
        self._where = Progress(-1, 0)
        self._waits_for = -1  # training stands still for this round's block, unless it is committed
        self._joining_since = now
        self._leave = Leave("")
        self._effects: list[Effect] = []

    # The outside

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at time `now`; the effects are to be performed in order."""
        assert not self._effects
        try:
            if self.state is not State.GONE:
                self._take(event, now)
            return self._effects
        finally:
            self._effects = []

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Received():
                self._receive(event.envelope, now)
            case Prepared():
                first, self._prepared = self._prepared is None, replace(event, kept=None)  # that is given on
                self._arrivals.prepare(event.config, event.manifest)
                self._patience.settle(event.config.network)
                self._contributions.keeps_late = event.config.round.late == "fold"
                if first:
                    self._turns = Turns(event.config, len(event.manifest.blocks))
                    self._take_part_in_sums()
                    self._resume(event.kept, now)
                if self.state is State.PREPARING:
                    self._join(now)
            case Contribute():
                self._contribute(event, now)
            case Ready(round, chunk):
                self._contributions.ready(round, chunk, now, live=self.state is State.TRAINING)
            case OnDisk(round, again):
                self._contributions.stored(round, again)
            case Fetched(round, index, chunk):
                self._contributions.fetched(round, index, chunk, live=self.state is State.TRAINING)
            case Withhold(round, reason):
                self._passed(round)
                live = self.state is State.TRAINING
                self._contributions.withhold(Abstain(round, reason), self.told, live=live)
            case Withdraw(round, reason):
                self._withdraw(round, reason)
            case SitOut(round):
                self._where = Progress(-1, 0)
                self._passed(round)
                self._contributions.passed(round)
            case Say(message):
                if self.state is State.TRAINING:
                    self._send(message)
            case Progress():
                self._where, self._waits_for = event, -1
            case Wait(round):
                self._waits_for = round
                self._say_waiting()
            case Finish(reason):
                self._finish(reason, now)
            case Denied(reason):
                self._gone(End.REFUSED, reason)
            case Tick():
                self._tick(now)

    def _resume(self, kept: Kept | None, now: float) -> None:
        """Be the process that has kept this."""
        if kept is None:
            return
        if kept.run != self._run:
            self._notice(f"what was kept is of another run ({kept.run}); it is not used")
            return
        self._arrivals.restore(kept)
        self._contributions.restore(kept.held, kept.position, self._config.network.window_bytes, now)
        self._begun = True

    def deadline(self) -> float:
        """When the next `Tick` is due, on the scale of `now`."""
        patience = self._patience
        if self.state is State.CALLING:
            return patience.calls_at()
        if self.state is State.LEAVING:
            return patience.leaves_at()
        if self.state is State.TRAINING and not patience.silent:
            return min(patience.beats_at(), self._contributions.stalled_at(patience.resend_s))
        return patience.beats_at()

    def may_train(self, round: int) -> bool:
        """Whether everything that `round` builds on is in hand: all but the last `in_flight` rounds before it.

        And whether we are told what it is: after a Start that was delayed since an earlier session we may not be, until
        the newest one comes.
        """
        config = self._config
        if self.state is not State.TRAINING or not self.arrived_through(round - config.in_flight - 1):
            return False
        assert self._turns is not None
        return round >= config.rounds or self._turns.knows(round)

    def arrived_through(self, round: int) -> bool:
        """Whether every block that was committed in or before `round` is in hand."""
        return self._arrivals.through(round)

    def turn(self, round: int) -> Turn | None:
        """What a round is for us. Known of every round that may be trained, and of those before that are on the way;
        None of one that we are not told of."""
        assert self._turns is not None
        return self._turns.turn(round)

    def wants(self, round: int) -> bool:
        """Whether a contribution to `round` may still be of use."""
        return round >= self.told or self._contributions.keeps_late

    @property
    def run(self) -> str:
        """The run's id, as the terms said it."""
        return self._run

    @property
    def told(self) -> int:
        """The first round that is not known to be committed; one before it need not be trained any more."""
        return self._arrivals.told

    # Messages

    def _receive(self, envelope: Envelope, now: float) -> None:
        message = envelope.message
        if self.state not in EXPECTED.get(type(message), ()):
            return
        known = (envelope.run, envelope.epoch) == (self._run, self._epoch)
        if envelope.run == self._run and envelope.epoch < self._epoch:
            return  # said by the broker before it was restarted
        farewell = isinstance(message, Goodbye) and envelope.run == self._run  # be it by a broker that does not know us
        if not known and not farewell and not isinstance(message, Terms | Rejoin | Refused | Stopped):
            return
        if self._patience.heard(now):
            self._notice("the broker is back")
        match message:
            case Heartbeat():
                pass  # it says that the broker is there
            case Chunk():
                assert envelope.payload is not None
                self._chunk(message, envelope.payload, now)
            case Credit():
                try:
                    self._contributions.credit(message, now)
                except TransferError as error:
                    self._gone(End.REFUSED, f"the broker broke the protocol: {error}")
            case Commit():
                self._commit(message, now)
            case Terms():
                self._terms(envelope, message, now)
            case Rejoin(reason):
                self._rejoin(reason, now)
            case Welcome(clients):
                self.state = State.WAITING
                self._notice(f"on the roster ({clients} so far); waiting for the start")
            case Start():
                self._take_start(message, now)
            case Rejected(round, reason):
                if self._sums is not None:
                    self._sums.refuse(round)
                self._contributions.dismiss(round, reason)
            case Roll() | Dealt() | Unmask():
                self._hear_of_sum(message, envelope.payload, now)
            case Late(round, into):
                self._contributions.deferred(round, into, now)
            case Refused(reason):
                self._gone(End.REFUSED, reason)
            case Stopped(reason, returns):
                if not returns:
                    self._gone(End.LOST, f"the broker stopped: {reason}")
                elif self.state is State.LEAVING:
                    self._gone(End.DONE, f"left the run (the broker stopped: {reason})")
                else:  # the next one will not know us, and say so
                    self._patience.stop()
                    self._notice(f"the broker stopped: {reason}; waiting for it to come back")
            case Goodbye():
                self._gone(End.DONE, "left the run")

    def _terms(self, envelope: Envelope, terms: Terms, now: float) -> None:
        if self._invited_to and envelope.run != self._invited_to:
            self._gone(
                End.REFUSED,
                f"the invite is to the run {self._invited_to}, and the broker serves {envelope.run}; ask its owner "
                "for a new one (`parablock invite`)",
            )
            return
        if self._run and envelope.run != self._run:
            self._gone(End.LOST, f"the broker now serves another run ({envelope.run} instead of {self._run})")
            return
        if self._name and terms.name != self._name:  # by which its rows are drawn and its state is kept
            self._gone(End.REFUSED, f"the broker calls this worker {terms.name} now, and {self._name} before")
            return
        if terms.name not in (self._name, self._hello.name):
            self._notice(f"the broker's list calls this worker {terms.name}, not {self._hello.name}")
        self._name = terms.name
        if envelope.epoch != self._epoch:
            self._arrivals.forget()
        self._run, self._epoch = envelope.run, envelope.epoch
        if self._sums is not None:
            self._greet_sums()
        if self._prepared is None:
            self.state, self._settings = State.PREPARING, terms.config
            self._effects.append(Prepare(terms.config, terms.name))
            return
        if terms.config != self._settings:
            try:
                self._patience.settle(settings.from_json(terms.config).network)
            except settings.ConfigError as error:  # it was another one, with other settings, by which we are prepared
                self._gone(End.REFUSED, f"the broker's settings cannot be: {error}")
                return
            self._settings = terms.config
        self._join(now)

    def _rejoin(self, reason: str, now: float) -> None:
        """The broker forgot us, or thinks otherwise of us. What it has committed meanwhile will be sent."""
        self._notice(f"joining again: {reason}")
        self._arrivals.suspend()
        self.state = State.CALLING
        if self._patience.call_anew(now):
            self._call(now)

    def _join(self, now: float) -> None:
        assert self._prepared is not None
        if self.state is not State.JOINING:
            self.state, self._joining_since = State.JOINING, now
        digest, prepared = self._prepared.manifest.digest, self._prepared
        position = self._contributions.position if self._begun else -1
        # Where each client hides by its own noise what its rows are, it does not tell how many they are either.
        rows = min(prepared.rows, 1) if prepared.config.privacy.local else prepared.rows
        self._send(Join(digest, prepared.base, prepared.tokenizer, rows, self._arrivals.versions, position))
        self._patience.said(now)

    def _take_start(self, start: Start, now: float) -> None:
        if self.state is State.TRAINING:
            assert self._start is not None
            if start != self._start and start.next >= self._start.next:
                self._rejoin("the broker has started this worker anew", now)
            return
        if start.next < self._arrivals.greeted_at:
            if self._arrivals.told_in < self._epoch:
                self._goes_back(start.next)
            elif now >= self._joining_since + self._patience.resend_s:  # repeated: to the broker that session goes on
                self._rejoin("the broker repeats the start of an earlier session", now)
            return  # else of an earlier session: it would leave out what was committed since
        if not self._hear(start.next, start):
            return
        self.state = State.TRAINING
        self._start = start
        self._arrivals.start(start, self._epoch)
        first = max(start.round, self._contributions.position)
        self._emit(Started(first, start.clients, start.next, start.pending))
        self._contributions.start(start.round, start.next, self.told, now)
        if self._sums is not None:
            self._sums.start(start)
        self._show_keys()
        self._begun = True
        self._heartbeat(now)  # at once: the broker places our reports in time by it

    def _goes_back(self, next_round: int) -> None:
        """The broker was started again from a journal that lacks rounds which another one had announced."""
        private = self._prepared is not None and self._prepared.config.privacy.local
        without = (
            "or this worker's part in the run ends here, as it tells nothing of its data twice"
            if private
            else "or begin here without what was kept (delete the folder that --state names)"
        )
        self._gone(
            End.REFUSED,
            f"the broker goes on with round {next_round}, but round {self._arrivals.greeted_at - 1} was announced as "
            "committed before: its journal is older than what it has announced. Have the run's newest folder put back "
            f"there; {without}",
        )

    def _commit(self, commit: Commit, now: float) -> None:
        if not self._arrivals.fits(commit):
            self._gone(End.REFUSED, f"the broker announced a block that is not in the manifest: {commit}")
            return
        if not self._hear(commit.round + self._config.in_flight + 1, commit):
            return
        self._arrivals.tell(commit.round, self._epoch)
        self._contributions.committed(commit.round, counted=commit.counted)
        self._show_keys()
        self._arrivals.commit(commit, now)

    def _hear(self, first: int, message: Start | Commit) -> bool:
        """Take in what is said of rounds from `first` on; false if that cannot be, which ends the session."""
        assert self._turns is not None
        try:
            self._turns.hear(first, message.blocks, message.trains)
        except ValueError as error:
            self._gone(End.REFUSED, f"the broker announced what cannot be: {error}")
            return False
        return True

    @property
    def _config(self) -> Config:
        assert self._prepared is not None
        return self._prepared.config

    def _chunk(self, chunk: Chunk, payload: Buffer, now: float) -> None:
        if not self._arrivals.expects(chunk):
            if not self._may_come(chunk):
                return  # complete already, or its commit was lost: the sender hears of the one and repeats the other
            self._arrivals.begin(chunk, now)
        try:
            self._arrivals.take(chunk, payload, now)
        except TransferError as error:
            self._gone(End.REFUSED, f"the broker broke the protocol: {error}")

    def _may_come(self, chunk: Chunk) -> bool:
        """Whether this may be a block of a round that is not closed: we take part, and the round trains that block."""
        return (
            self.state is State.TRAINING
            and chunk.attempt > 0
            and self.told <= chunk.round <= self.told + self._config.in_flight
            and chunk.round < self._config.rounds
            and (turn := self.turn(chunk.round)) is not None  # not before: no round beyond those need be worked out
            and chunk.block == turn.block
        )

    def _passed(self, round: int) -> None:
        assert self._turns is not None
        self._turns.passed(round)

    def _contribute(self, event: Contribute, now: float) -> None:
        self._passed(event.round)
        assert self._prepared is not None
        layout = Layout.up(self._config, self._prepared.manifest.blocks[event.block].numel)
        payload = Payload.of(layout)
        offer = Offer(event.round, event.block, payload.nbytes, event.weight, event.steps, event.loss)
        window, live = layout.window_bytes(self._config), self.state is State.TRAINING
        if (reason := self._contributions.withheld(event.round)) is not None:
            self._contributions.withhold(Abstain(event.round, reason), self.told, live=live)
            return
        live = live and (self._sums is None or not self._sums.waits(event.round))
        if event.round < self.told:
            self._contributions.late(offer, payload, window, now, live=live)
        else:
            self._contributions.offer(offer, payload, window, now, live=live)

    # Time

    def _tick(self, now: float) -> None:
        patience, calling = self._patience, self.state is State.CALLING
        if (reason := patience.ended(now)) is not None:
            self._gone(End.LOST, reason)
            return
        if (silence := patience.fell_silent(now, calling=calling)) is not None:
            self._notice(f"{silence}; waiting for it")
        if calling:
            if patience.call_due(now):
                self._call(now)
        elif self.state is State.LEAVING:
            if patience.farewell_due(now):
                self._leave_again(now)
        elif patience.heartbeat_due(now):
            self._heartbeat(now)
        if self.state is State.TRAINING and not patience.silent:  # else it would all queue up ahead of the next Hello
            self._contributions.resend(patience.resend_s, now)

    def _call(self, now: float) -> None:
        self._send(self._hello)
        self._patience.called(now)

    def _leave_again(self, now: float) -> None:
        if self._patience.unanswered(now):
            self._gone(End.DONE, "left the run (the broker did not answer)")
            return
        self._send(self._leave)
        self._patience.said(now)

    def _heartbeat(self, now: float) -> None:
        if self.state is State.JOINING:
            self._join(now)  # the Welcome was lost, or is on its way
        if self.state is State.TRAINING:
            self._contributions.abstain()
            self._say_waiting()
            if self._sums is not None:
                self._sums.remind()
        self._send(Heartbeat(now, self._where.round, self._where.step, self.state.value))
        self._patience.said(now)

    # Secure sums

    def _take_part_in_sums(self) -> None:
        assert self._prepared is not None
        if self._config.secure.enabled:
            from parablock.memberships import Memberships  # cryptography is an extra

            self._sums = Memberships(
                self._config, self._prepared.manifest, self._name, self._send, self._emit, self._withdraw
            )
            self._sums.greet(self._run, self._epoch)

    def _greet_sums(self) -> None:
        """Begin anew with another broker's."""
        assert self._sums is not None
        if self._sums.greet(self._run, self._epoch):
            self._contributions.unmask()

    def _show_keys(self) -> None:
        """Begin with the sums of all rounds that are known and that we train, or have trained."""
        if self._sums is None or self._start is None:
            return
        told = self.told
        self._sums.forget(told)
        for round in range(max(told, 0), min(told + self._config.in_flight + 1, self._config.rounds)):
            turn, ahead = self.turn(round), round >= max(self._start.round, self._contributions.position)
            ours = turn is not None and turn.trains and (ahead or self._contributions.holds(round))
            if turn is not None and ours and self._contributions.withheld(round) is None:
                self._sums.begin(round, turn.block)

    def _hear_of_sum(self, message: Roll | Dealt | Unmask, payload: Buffer | None, now: float) -> None:
        try:
            if self._sums is None:
                raise ValueError(f"a {type(message).__name__} in a run whose contributions are not masked")
            if self._sums.hear(message, payload):
                self._contributions.mask(message.round, now, live=self.state is State.TRAINING)
        except ValueError as error:
            self._gone(End.REFUSED, f"the broker broke the protocol: {error}")

    def _withdraw(self, round: int, reason: str) -> None:
        live = self.state is State.TRAINING
        self._contributions.withdraw(Abstain(round, reason), self.told, live=live)

    def _say_waiting(self) -> None:
        if self.state is State.TRAINING and self._waits_for >= self.told:
            self._send(Waiting(self._waits_for))

    def _finish(self, reason: str, now: float) -> None:
        if self._patience.stopped or (self.state in (State.CALLING, State.PREPARING) and not self._run):
            self._gone(End.DONE, reason)  # there is nobody to leave
            return
        self.state = State.LEAVING
        self._leave = Leave(reason)
        self._send(self._leave)
        self._patience.leaves(now)

    def _gone(self, end: End, reason: str) -> None:
        self.state = State.GONE
        self._effects.append(Gone(end, reason))

    def _notice(self, text: str) -> None:
        self._effects.append(Notice(text))

    def _send(self, message: FromWorker, payload: Buffer | None = None) -> None:
        self._effects.append(Send(Envelope(self._run, self._epoch, message, payload)))

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)
