import os
import signal
import threading

import pytest

from rlhf_jax.devices import preemption
from rlhf_jax.runs import cli
from tests.runs.test_cli import Config


def ask():
    os.kill(os.getpid(), signal.SIGTERM)


def test_where_nothing_is_to_be_saved_it_ends_at_once():
    with pytest.raises(preemption.Preempted), preemption.handle_sigterm():
        ask()
        pytest.fail("went on")
    assert not preemption.requested()


def test_a_loop_ends_when_it_is_ready():
    done = []
    with pytest.raises(preemption.Preempted), preemption.handle_sigterm():
        with preemption.defer():
            assert not preemption.requested()
            ask()
            assert preemption.requested()
            done.append("the step")
        pytest.fail("went on")
    assert done == ["the step"]


def test_another_error_goes_first():
    with pytest.raises(KeyError), preemption.handle_sigterm(), preemption.defer():
        ask()
        raise KeyError


def test_the_command_ends_with_a_status_of_its_own(capsys):
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda _: ask(), Config(), [])
    assert stop.value.code == preemption.EXIT == 75
    assert capsys.readouterr().err == "asked to end by SIGTERM: run the same command again to go on\n"
    assert signal.getsignal(signal.SIGTERM) is former


def test_elsewhere_than_on_the_main_thread_the_signal_is_left_alone():
    former, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with preemption.handle_sigterm():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [former]
