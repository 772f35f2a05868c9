"""The threats that a run must withstand, row by row, and the tests that show each. All kinds at once: `bench.fuzz`.

 1  a peer that nobody knows: encryption and an allow-list by default, what is not allowed is denied
        test_authenticator      test_an_unknown_key_is_refused_and_told
        test_authenticator      test_nobody_is_let_in_where_there_is_no_list
        test_authenticator      test_nobody_is_let_in_where_the_door_has_failed_and_the_broker_is_told
        test_authenticator      test_a_broker_without_keys_or_with_bad_ones_does_not_start
        test_network_endpoint   test_plain_tcp_off_loopback_is_refused
        test_keys_end_to_end    test_a_run_lets_in_and_cuts_off_as_the_list_says
        test_guard              test_of_many_that_say_nothing_the_newest_go
        test_guard              test_of_a_burst_no_more_go_than_are_too_many
        test_guard              test_hundreds_behind_one_address_and_a_slow_link_get_in
        test_guard              test_a_port_scan_of_garbage_disturbs_nobody
 2  one client that poses as another: its key is what counts, not its name nor its routing id
        test_session_keys       test_the_name_is_the_lists_whatever_the_greeting_says
        test_session_keys       test_two_keys_that_call_themselves_alike_are_two_clients
        test_session_keys       test_a_valid_key_with_anothers_routing_id_is_kept_apart
        test_authenticator      test_a_valid_key_with_anothers_routing_id_is_told_apart
        test_guard              test_who_takes_over_an_address_is_cut_off_and_not_its_owner
 3  a client that is trusted no more: cut off while its session lives
        test_session_keys       test_a_revoked_client_is_out_at_once_and_nobody_waits_for_it
        test_authenticator      test_a_change_of_the_list_holds_for_who_is_there_and_who_comes
        test_authenticator      test_a_list_is_read_again_until_it_can_be_and_told_of_once
        test_authenticator      test_a_revoked_key_keeps_no_connection_that_has_said_nothing
        test_authenticator      test_what_comes_by_a_revoked_key_costs_its_connection_and_nobody_elses
        test_broker_command     test_a_client_that_was_revoked_while_no_broker_served_is_not_waited_for
        test_allow_list         test_the_list_does_not_hang_on_the_umask
        test_keys_end_to_end    test_a_run_lets_in_and_cuts_off_as_the_list_says
 4  an eavesdropper, or somebody who plays the broker
        test_authenticator      test_a_recorded_session_cannot_be_played_again_nor_read
        test_authenticator      test_a_broker_with_another_key_is_not_spoken_to
        test_session_keys       test_an_invite_to_another_run_is_told
        test_refusals           test_a_forged_refusal_ends_nobody_who_can_still_get_through
 5  replay across sessions: run, epoch, round and attempt are checked
        test_authenticator      test_a_recorded_session_cannot_be_played_again_nor_read
        test_session_keys       test_a_message_of_another_session_run_or_epoch_changes_nothing
        test_coordinator        test_a_message_of_another_run_or_epoch_is_not_taken
        test_protocol           test_a_message_of_an_earlier_broker_changes_nothing
 6  malformed messages: refused before they cost anything, and whoever sends them is dropped, counted and named
        test_wire               test_a_header_that_is_too_long_is_refused_before_it_is_parsed
        test_wire               test_nesting_is_refused_at_any_depth
        test_wire               test_lists_that_announce_more_than_they_hold_cost_no_memory
        test_wire               test_a_value_of_another_type_is_refused_in_every_field
        test_fuzz               test_the_decoder_refuses_what_is_wrong_soon_and_in_little_memory
        test_fuzz               test_whatever_peers_say_the_machine_goes_on_and_honest_clients_are_served
        test_coordinator        test_who_breaks_the_protocol_is_dropped_counted_and_named
        test_coordinator        test_a_client_is_not_let_in_again_for_a_while_and_longer_each_time
        test_authenticator      test_who_is_barred_stays_out_until_the_time_is_over
        test_coordinator        test_the_names_of_strangers_do_not_fill_the_record
        test_coordinator        test_names_that_nothing_proves_do_not_fill_the_record
        test_coordinator        test_one_clients_comings_and_goings_do_not_fill_the_record
        test_view               test_what_a_terminal_would_obey_is_shown_and_not_obeyed
        test_guard              test_a_dropped_peer_hears_why_and_is_cut_off_alone
 7  messages that are huge, endless or too many: bounded by credit and quota, cut off beyond
        test_guard              test_a_message_without_an_end_is_cut_off
        test_guard              test_nobody_is_blamed_for_who_has_its_descriptor_afterwards
        test_guard              test_before_anything_is_said_a_flood_is_cut_off_too
        test_authenticator      test_nobody_gets_past_the_handshake_before_anybody_looks
        test_guard              test_who_reads_nothing_is_cut_off_when_its_queue_is_full
        test_guard              test_a_client_has_so_many_connections_and_the_newest_stay
        test_sockets            test_of_an_endless_message_only_the_first_frames_are_kept
        test_coordinator        test_a_flood_of_any_message_is_dropped
        test_coordinator        test_a_flood_of_chunks_that_nobody_granted_is_dropped
        test_coordinator        test_a_probe_too_many_is_refused_and_a_flood_of_them_dropped
        test_coordinator        test_chunks_within_the_credit_cost_nothing
        test_wire               test_a_payload_may_have_8_mib_and_not_a_byte_more
 8  lengths, dtypes and shapes that a peer claims: those of the manifest hold, and nothing is inflated
        test_coordinator        test_an_impossible_offer_breaks_the_protocol
        test_coordinator        test_an_impossible_chunk_breaks_the_protocol
        test_coordinator        test_an_impossible_credit_breaks_the_protocol
        test_wire               test_forms_of_msgpack_that_no_field_has_are_refused
        test_fuzz               test_what_is_valid_is_taken_and_what_is_made_of_it_is_another_thing
 9  NaN, infinity, norms that blow up: found chunk by chunk, and not counted
        test_broker_blocks      test_unfit_names_the_client_whose_values_are_not_finite
        test_coordinator        test_an_unfit_contribution_is_rejected_and_the_round_goes_on
        test_measurement        test_what_is_not_finite_is_named_and_the_attempt_given_up
        test_measurement        test_huge_finite_values_are_measured_and_cut
        test_verdict            test_who_sends_what_is_not_finite_is_one_of_the_bad_that_a_rule_bears
10  poisoned updates: rules that bear so many, by choice
        test_robust             test_two_bad_ones_do_not_move_it_beyond_the_honest
        test_robust             test_one_more_than_it_bears_takes_a_rule_over
        test_robust             test_a_clipped_contribution_has_the_direction_that_it_had
        test_robust_settings    test_what_cannot_be_borne_is_refused
        test_verdict            test_too_few_for_the_rule_leave_the_block_as_it_is_and_hear_why
11  training text that leaves its client: tensors and numbers travel, and nothing else
        test_text_leak          test_nothing_of_a_clients_text_is_on_the_wire_or_at_the_broker
        test_text_leak          test_what_is_looked_for_is_found_where_it_is
12  code in data: nothing is unpickled or evaluated, and what would is not in the code
        test_banned             test_nothing_that_is_banned_is_in_the_code
        test_banned             test_a_planted_line_is_found
        test_models             test_code_of_the_repository_is_refused_and_not_run
13  what a client's update tells of its text: noise by a stated measure, or a sum of which only the sum is seen
        test_noise              test_no_delta_leaves_longer_than_it_may
        test_noise              test_one_client_more_or_less_moves_the_sum_by_no_more_than_the_noise_is_made_for
        test_noise              test_noise_depends_on_nothing_that_anybody_knows
        test_accountant         test_epsilon_is_that_of_the_analytic_gaussian_mechanism
        test_privacy            test_nothing_of_a_block_leaves_before_its_round_is_durable
        test_releases           test_no_more_leave_than_the_budget_allows_whatever_the_broker_says
        test_secure_protocol    test_the_broker_is_told_no_value_of_any_contribution
        test_secure_protocol    test_what_is_masked_looks_like_noise
        test_secure_sum         test_a_member_answers_for_one_set_of_a_slice_and_gives_one_share_of_each
        test_secure_sum         test_the_sum_is_exact_whoever_falls_out_when_and_else_nothing_is_counted
14  secrets in files or logs: files that others may read are refused
        test_keys               test_a_secret_that_others_may_read_is_refused
        test_keys               test_a_pair_is_two_files_and_the_secret_one_is_its_owners_alone
        test_keys               test_each_kind_is_refused_in_the_place_of_the_other
        test_keys               test_a_keys_folder_that_is_open_to_others_is_refused
        test_keys               test_what_belongs_to_another_user_is_refused
        test_keys               test_no_character_of_a_secret_is_shown
        test_allow_list         test_a_list_that_others_may_change_is_refused
        test_launch             test_throw_away_keys_are_nobody_elses_and_stay_as_long_as_the_run_can_go_on
        test_threats            test_a_secret_key_does_not_show_itself
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.pairs import new_pair
from parablock.keys import SECRET, read_secret
from tests import listed

if TYPE_CHECKING:
    from pathlib import Path


def test_every_threat_is_met_by_tests_that_there_are() -> None:
    listed.check(__doc__, rows=14)


def test_a_secret_key_does_not_show_itself(tmp_path: Path) -> None:
    """Where a log or a traceback names one, it is not the key that stands there."""
    new_pair(tmp_path, "us")
    secret = read_secret(tmp_path / f"us{SECRET}")
    assert secret.key in (tmp_path / f"us{SECRET}").read_text(encoding="utf-8")
    assert secret.key not in f"{secret} {secret!r} {vars(type(secret))}"
