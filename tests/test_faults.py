"""The faults that a run must survive, row by row, and the tests that show each. All kinds at once: `tests.histories`.

 1  an acknowledgement is lost, and the client sends again: the update is counted once, in one round
        test_coordinator        test_a_lost_acknowledgement_is_repeated_and_the_update_counts_once
        test_protocol           test_an_upload_that_was_cut_goes_on_where_it_was_and_counts_once
        test_protocol           test_a_cut_at_any_moment_costs_no_contribution
        test_late               test_an_offer_after_the_close_is_late_once
        test_late               test_a_broker_that_begins_anew_knows_what_has_counted_late
 2  the broker is killed, at any point: nothing that was acknowledged is lost, and clients go on by themselves
        test_opening            test_killed_at_any_point_a_round_is_held_or_it_is_not
        test_opening            test_what_goes_on_is_what_would_have_gone_on
        test_journal            test_what_was_appended_is_there_after_a_crash
        test_block_versions     test_the_version_is_on_disk_before_its_name_is
        test_restart            test_an_entry_says_all_of_a_round_and_nothing_is_announced_before_it_is_durable
        test_protocol           test_a_broker_that_dies_at_any_point_of_a_commit_costs_no_contribution
        test_end_to_end         test_a_run_outlives_its_brokers_and_ends_as_if_there_had_been_one
 3  a file is torn, or a bit of it has flipped: found, named, gone back from, never loaded silently
        test_block_file         test_every_flipped_bit_of_the_file_is_found
        test_block_file         test_a_file_torn_anywhere_is_refused
        test_journal            test_no_flipped_bit_loads_another_history
        test_journal            test_a_row_that_was_changed_or_lost_is_named
        test_opening            test_a_damaged_version_is_gone_back_from_and_never_forgotten
        test_opening            test_what_cannot_be_repaired_is_refused_and_named
        test_verify_command     test_every_damaged_file_is_named
        test_state_folder       test_what_is_damaged_is_said_and_not_loaded
 4  the connection is cut at a chunk's boundary: only what is missing is sent again, and the bytes are the same
        test_faults             test_cut_at_every_boundary_only_what_is_missing_is_sent_again
        test_protocol           test_an_upload_that_was_cut_goes_on_where_it_was_and_counts_once
        test_protocol           test_a_download_that_was_cut_goes_on_where_it_was
 5  chunks come twice, in another order, of two attempts: none is counted twice, and no attempt is mixed
        test_transfer           test_what_arrives_is_what_was_sent_whatever_is_lost_or_comes_twice
        test_coordinator        test_another_process_of_the_name_begins_its_upload_anew
        test_coordinator        test_a_lost_process_leaves_no_half_upload_to_another
        test_restart            test_what_an_earlier_process_had_begun_its_successor_sends_anew
        test_cut_through        test_a_higher_attempt_takes_the_place_of_a_lower_one
        test_cut_through        test_what_is_still_folded_of_a_given_up_attempt_goes_nowhere
        test_cut_through        test_an_attempt_of_a_broker_that_has_begun_anew_is_another_one
        test_inbox              test_attempts_and_rounds_that_come_at_once_do_not_mix
 6  a message of an old epoch, or to a closed round: refused with a reason, and nothing goes back
        test_coordinator        test_a_message_of_another_run_or_epoch_is_not_taken
        test_coordinator        test_a_straggler_is_told_that_the_round_has_closed
        test_participant        test_what_another_epoch_says_is_passed_over
        test_protocol           test_a_message_of_an_earlier_broker_changes_nothing
 7  a connection is half open when its client is back: the new session wins, the old one is fenced
        test_restart            test_a_session_that_another_has_replaced_is_fenced
        test_coordinator        test_a_name_belongs_to_the_newest_process
        test_protocol           test_a_process_that_takes_over_a_name_does_not_mix_with_the_one_before
        test_protocol           test_an_old_greeting_that_turns_up_late_does_not_end_anything
 8  one of many reads slowly: the others keep their rate, and the broker's memory its bound
        test_faults             test_one_slow_link_costs_the_others_nothing_and_the_broker_no_more_than_a_window
        test_cut_through        test_a_slow_client_delays_nobody
        test_coordinator        test_one_window_is_under_way_to_a_session_earlier_blocks_first
        test_coordinator        test_who_falls_too_far_behind_joins_again_for_the_newest_blocks
        test_sockets            test_answers_that_nobody_reads_share_their_payload
 9  the broker is stopped beyond the heartbeat, and goes on: clients recover, nothing is counted twice
        test_protocol           test_a_process_that_was_stopped_for_a_while_goes_on
10  the quorum is lost in mid-round: the policy applies once, and nothing is committed in part
        test_quorum             test_what_is_missing_for_long_enough_is_given_up_once
        test_protocol           test_a_round_waits_for_the_quorum_and_a_newcomer_restores_it
        test_protocol           test_a_quorum_that_does_not_come_back_is_done_without_where_that_is_the_policy
        test_protocol           test_a_quorum_that_does_not_come_back_stops_the_run_where_that_is_the_policy
        test_coordinator        test_a_round_that_is_being_stored_is_committed_whole_before_the_quorum_is_given_up
11  the disk is full: nothing is acknowledged, what was there stays, and it goes on when there is room
        test_opening            test_a_full_disk_commits_nothing_and_may_be_tried_again
        test_journal            test_a_full_disk_is_told_and_the_round_may_be_tried_again
        test_broker_command     test_what_cannot_be_stored_is_not_said_and_tried_until_there_is_room
        test_protocol           test_a_full_disk_delays_the_run_and_loses_nothing
        test_keeper             test_a_full_disk_is_said_once_and_written_again_when_there_is_room
12  the wall clock jumps: nobody is given up
        test_faults             test_what_times_out_reads_no_wall_clock
        test_restart            test_clocks_that_jump_evict_nobody
        test_planted_bugs       test_a_planted_bug_is_caught_by_a_history_that_ends_well_without_it
13  a client is killed while it trains: the round closes by its policy, and only changed blocks come anew
        test_protocol           test_a_death_that_leaves_a_quorum_holds_the_others_up_for_the_timeout_only
        test_protocol           test_a_worker_that_is_killed_goes_on_from_what_it_has_kept
        test_protocol           test_a_late_joiner_gets_the_blocks_that_changed_and_nobody_waits_for_it
        test_coordinator        test_a_late_worker_gets_only_the_blocks_that_it_lacks
        test_comeback           test_whenever_it_is_killed_it_goes_on_as_if_it_had_not_been
        test_end_to_end         test_a_killed_worker_is_missed_and_a_new_one_catches_up
        test_end_to_end         test_a_worker_that_is_killed_goes_on_as_if_nothing_had_happened
14  contributions come in any order: the same block, bit for bit
        test_protocol           test_the_order_of_arrival_does_not_change_a_bit
        test_coordinator        test_all_contributions_are_folded_in_roster_order_and_committed
15  an upload is begun and withheld: its place is free at the deadline
        test_coordinator        test_an_upload_that_is_withheld_is_reclaimed_and_the_round_goes_on
        test_restart            test_an_upload_that_is_withheld_gives_up_its_place_when_its_client_is_lost
16  SIGTERM: it finishes what it is at, keeps it, leaves, and says so
        test_end_to_end         test_interrupt_ends_everything_in_good_order
        test_end_to_end         test_a_run_outlives_its_brokers_and_ends_as_if_there_had_been_one
        test_coordinator        test_stopping_tells_everybody
        test_launch             test_a_signal_is_passed_on_and_the_children_end_in_good_order
17  another model, tokenizer or manifest: refused at the door, and told what differs
        test_coordinator        test_a_worker_that_does_not_match_is_refused_and_told_what_differs
        test_protocol           test_a_worker_that_does_not_match_is_refused_and_the_others_go_on
        test_end_to_end         test_a_worker_of_another_model_is_refused_at_the_door
18  the loss of one client becomes NaN: that is refused and told, and the run goes on
        test_round_loop         test_a_round_that_diverges_is_withheld_and_told_and_the_run_goes_on
        test_broker_blocks      test_unfit_names_the_client_whose_values_are_not_finite
        test_coordinator        test_an_unfit_contribution_is_rejected_and_the_round_goes_on
        test_protocol           test_a_contribution_that_is_not_finite_is_rejected_and_the_run_goes_on
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parablock.messages import Chunk, Commit
from tests import listed
from tests.network import Faults, Habits, Incident, Network, config_of

if TYPE_CHECKING:
    from parablock import wire
    from tests.network import Process

ROOT = Path(__file__).parent.parent
STEADY = Habits(seconds=(1.0, 1.0))

# The table


def test_every_fault_is_shown_by_tests_that_there_are() -> None:
    listed.check(__doc__, rows=18)


# Row 4


def ended(network: Network) -> Network:
    network.run().check_ended()
    return network


def chunks(network: Network) -> list[tuple[float, tuple[bool, int, int, int]]]:
    """Of client a: when each was sent, and which it is: up or down, round, attempt, offset."""
    return [
        (sent.at, (sent.up, sent.message.round, sent.message.attempt, sent.message.offset))
        for sent in network.sent
        if sent.client == "a" and isinstance(sent.message, Chunk)
    ]


CUT = Faults(delay_s=(0.3, 0.3))
"""Slow enough that each chunk is a moment of its own."""


def test_cut_at_every_boundary_only_what_is_missing_is_sent_again() -> None:
    """Before each chunk, either way, the link of a goes, for longer than the session lasts. What had arrived by then
    is sent once; that all bytes are those that were sent, the world asserts."""
    config = config_of(2, rounds=4, window=1024)
    clean = chunks(ended(Network(config, {"a": STEADY, "b": STEADY}, CUT)))
    assert len(clean) >= 16
    assert len({at for at, _ in clean}) >= 12
    for cut in sorted({at for at, _ in clean}):
        incident = Incident("cut", "a", at=cut - 0.01, lasts=9.0)
        network = ended(Network(config, {"a": STEADY, "b": STEADY}, Faults(delay_s=(0.3, 0.3), incidents=(incident,))))
        arrived = {chunk for at, chunk in chunks(network) if at < incident.at}
        again = {chunk for at, chunk in chunks(network) if at >= incident.at + incident.lasts}
        assert arrived & again == set(), f"cut at {cut}"
        assert [entry.contributors for entry in network.committed] == [("a", "b")] * 4
        assert all(len(made) == 1 for made in network.made.values()), "nothing is trained twice"


# Row 8


class OneSlow(Network):
    """What is said to or by c takes longer, each message after the one before."""

    slow_s = 0.0

    def _deliver(self, process: Process, envelope: wire.Envelope, arrives: float, *, up: bool) -> None:
        if process.name == "c" and envelope.payload is not None:
            link = self._links[up]
            arrives = self._links[up] = max(arrives, link) + self.slow_s
        super()._deliver(process, envelope, arrives, up=up)

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._links: dict[bool, float] = defaultdict(float)


def test_one_slow_link_costs_the_others_nothing_and_the_broker_no_more_than_a_window() -> None:
    """That no session has more than a window under way, and no more blocks wait for it than there are, the world
    asserts."""
    ends, behind = [], 0  # when a hears of the last round, and in how many c did not count
    for slow_s in (0.0, 1.5):
        config = config_of(3, rounds=40, quorum=2, deadline_s=0.1)
        network = OneSlow(config, dict.fromkeys("abc", STEADY))
        network.slow_s = slow_s
        told = [sent for sent in ended(network).sent if sent.client == "a" and isinstance(sent.message, Commit)]
        ends.append(told[-1].at)
        behind = sum("c" not in entry.contributors for entry in network.committed)
    assert behind >= 20, "it is slow"
    assert ends[1] <= 1.1 * ends[0]


# Row 12

WALL_CLOCK = {"time", "time_ns", "now", "utcnow", "today"}

NAMES_AND_STAMPS = {
    "broker/__main__.py": "names a run's folder",
    "broker/keys_command.py": "says when a client was let in",
    "broker/opening.py": "says when a run was opened",
    "parablock/launch.py": "names a run's folder",
    "parablock/quickstart.py": "names a run's folder",
    "parablock/verify_command.py": "names an incarnation",
}


def test_what_times_out_reads_no_wall_clock() -> None:
    """It is read where a name or a stamp is made, and nowhere else."""
    readers = set()
    for package in ("parablock", "broker", "workers"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in WALL_CLOCK and _is_a_clock(node.value):
                    readers.add(path.relative_to(ROOT).as_posix())
                if isinstance(node, ast.ImportFrom) and node.module == "time":
                    assert not {name.name for name in node.names} & WALL_CLOCK, path
    assert readers == set(NAMES_AND_STAMPS)


def _is_a_clock(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("time", "datetime", "date")
