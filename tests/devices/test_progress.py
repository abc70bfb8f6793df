"""Progress is a few lines off a terminal, and none of what is done soon."""

import re

from rlhf_jax.devices import progress


def test_what_is_done_soon_says_nothing(capsys):
    assert list(progress.of([3, 1, 2], "reading")) == [3, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_tells_how_much_is_done(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    assert list(progress.of(range(20), "reading")) == [*range(20)]
    printed, said = capsys.readouterr()
    assert not printed and "\r" not in said and 3 < len(said.splitlines()) < 20
    assert re.search(r"^reading:  \d\d% \d+/20 \[\d\d:\d\d<\d\d:\d\d, .*s/ batch\]$", said, re.MULTILINE)
    assert said.splitlines()[-1].startswith("reading: 100% 20/20")


def test_other_processes_say_nothing(capsys, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with progress.bar(2) as shown:
        shown.update(2)
    assert capsys.readouterr().err == ""
