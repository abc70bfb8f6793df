"""Training in several processes, timed."""

import pytest

from scripts import processes


@pytest.mark.full
def test_processes_are_timed_beside_one(capsys):
    found = processes.main(processes.Config(processes=(1, 2), rows=2, steps=2, rounds=1))
    assert all(list(each) == [1, 2] and min(each.values()) > 0 for each in found.values())
    assert "| fsdp | 2 |" in capsys.readouterr().out
