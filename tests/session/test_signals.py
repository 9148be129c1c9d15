"""Signals as requests."""

import os
import signal

import pytest

from autotunenet_jax.hosting import Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_the_second_raises(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        os.kill(os.getpid(), number)
        assert stop.is_requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop.is_requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_inside_a_shield_a_second_signal_waits_for_the_users_own_code():
    done = []
    with Stop() as stop, pytest.raises(KeyboardInterrupt), stop.shielded():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        done.append("books")
        with stop.exposed():
            done.append("callback")
    assert done == ["books"] and stop.is_requested and stop.name == "SIGTERM"


def test_where_a_shielded_run_is_exposed_a_second_signal_raises_at_once():
    done = []
    with Stop() as stop, stop.shielded():
        with pytest.raises(KeyboardInterrupt), stop.exposed():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("not reached")
        # Shielded again; the shield raises nothing that has been raised.
        done.append("reached")
    assert done == ["reached"]


def test_a_second_signal_in_a_shield_raises_at_its_end_at_the_latest():
    with Stop() as stop, pytest.raises(KeyboardInterrupt), stop.shielded():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
