"""The cache of compiled programs: its limit, and where it cannot be written."""

import errno
import math
import os
import tempfile
import threading
import warnings

import jax
import pytest

from rlhf_jax.runs import compiled

SETTINGS = {
    "jax_compilation_cache_dir": None,
    "jax_compilation_cache_max_size": -1,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
}


@pytest.fixture
def settings(monkeypatch):
    """JAX's settings as a process begins with them; those of the tests come back."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    with warnings.catch_warnings():
        for name, value in SETTINGS.items():
            jax.config.update(name, value)
        yield lambda: [jax.config.values[name] for name in SETTINGS]
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "rlhf_jax"


def write(folder, ages, size=100):
    """Entries that were used so many days ago."""
    folder.mkdir(parents=True, exist_ok=True)
    for age in ages:
        path = folder / f"jit_{age}-cache"
        path.write_bytes(bytes(size))
        os.utime(path, (1e9 - 86400 * age, 1e9 - 86400 * age))


def ages(folder):
    return sorted(int(path.name.removeprefix("jit_").removesuffix("-cache")) for path in folder.iterdir())


def test_the_least_recently_used_go(tmp_path):
    write(tmp_path / "cache", range(12))
    os.utime(tmp_path / "cache" / "jit_11-cache", (1e9, 1e9 - 86400 * 11))  # read today
    compiled.trim(tmp_path / "cache", 1200)
    assert len(ages(tmp_path / "cache")) == 12
    compiled.trim(tmp_path / "cache", 1000)
    assert ages(tmp_path / "cache") == [*range(8), 11]  # there is some room again


def test_several_processes_delete_at_once(tmp_path):
    write(tmp_path / "cache", range(400))
    failed = []

    def trim():
        try:
            compiled.trim(tmp_path / "cache", 20_000)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=trim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and ages(tmp_path / "cache") == list(range(180))


@pytest.mark.parametrize(("size", "left"), [(None, 12), ("1000", 9), ("-1", 12)])
def test_the_limit_is_two_gib_or_what_jax_is_told(settings, home, monkeypatch, capsys, size, left):
    write(home, range(12))
    if size:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", size)
        jax.config.update("jax_compilation_cache_max_size", int(size))  # as JAX reads it
    compiled.prepare()
    assert settings() == [str(home), -1, 0.0] and len(ages(home)) == left
    monkeypatch.setattr(compiled, "LIMIT", 500)
    jax.config.update("jax_compilation_cache_dir", None)
    compiled.prepare()
    assert len(ages(home)) == (left if size else 4)
    assert capsys.readouterr().err == ""


def test_no_cache(settings, home):
    jax.config.update("jax_compilation_cache_max_size", 0)
    compiled.prepare()
    assert settings()[0] is None and not home.exists()


@pytest.mark.parametrize("directory", ["gs://bucket/cache", "/mine"])
def test_a_directory_of_the_user_is_left_to_jax(settings, home, directory):
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_compilation_cache_max_size", 7)
    compiled.prepare()
    assert settings() == [directory, 7, 0.0] and not home.exists()


def test_a_home_that_cannot_be_written(settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    compiled.prepare()
    said = f"programs compiled here are not kept: {tmp_path / 'file' / '.cache' / 'rlhf_jax'}: Not a directory\n"
    assert capsys.readouterr().err == said and settings()[0] is None


@pytest.mark.parametrize("reason", [errno.EROFS, errno.ENOSPC])
def test_programs_of_a_disk_that_is_full_or_read_only_are_found(settings, home, monkeypatch, capsys, reason):
    def fail(*_, **__):
        raise OSError(reason, os.strerror(reason))

    write(home, range(3))
    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    compiled.prepare()
    assert capsys.readouterr().err == f"programs compiled here are not kept: {home}: {os.strerror(reason)}\n"
    assert settings() == [str(home), -1, math.inf] and ages(home) == [0, 1, 2]


def test_a_disk_that_fills_up_later_is_no_matter(settings, home):
    compiled.prepare()
    warnings.warn("Error writing persistent compilation cache entry for 'jit_f': OSError: disk full", stacklevel=1)
