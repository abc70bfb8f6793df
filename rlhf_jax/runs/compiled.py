"""The cache of compiled programs, so that a run finds what an earlier run has compiled.

It is `~/.cache/rlhf_jax`, unless the user names a directory to JAX (JAX_COMPILATION_CACHE_DIR), which then is left to
JAX alone. A run first deletes the programs that were used least recently, until the cache is below its limit: 2 GiB, or
as many bytes as JAX_COMPILATION_CACHE_MAX_SIZE says (-1: no limit, 0: no cache). JAX's own eviction does not take part,
since it reads a file per entry whenever it adds one: at 2 GiB that is more than a second for each new program.
"""

import contextlib
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path

import jax

LIMIT = 2 * 2**30  # bytes
ROOM = 0.1  # share of the limit that a run finds free, once something had to be deleted


def prepare() -> None:
    """Let JAX keep what it compiles; where that cannot be, say why in one line on stderr."""
    if jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 1.0:  # as it comes: most programs are smaller
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    limit, folder = _limit(), Path.home() / ".cache" / "rlhf_jax"
    jax.config.update("jax_compilation_cache_max_size", -1)
    if limit == 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if limit > 0:
            trim(folder, limit)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # a full disk has room for an empty file
    except OSError as error:
        print(f"programs compiled here are not kept: {folder}: {error.strerror}", file=sys.stderr)
        if not folder.is_dir():
            return
        jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)  # only what is there is read
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # If the disk fills up later, each program would have a warning of its own; what is lost is only time.
    warnings.filterwarnings("ignore", r"Error (reading|writing) persistent compilation cache entry")


def _limit() -> int:
    """The limit of the cache in bytes; -1 is none."""
    limit = jax.config.values["jax_compilation_cache_max_size"]
    return LIMIT if limit == -1 and "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ else limit


def trim(folder: Path, limit: int) -> None:
    """Delete the least recently used files of a folder if they have more than `limit` bytes together.

    Other processes may do the same, or use the folder, at the same time. What cannot be deleted stays.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    # Most file systems note a file's use once a day, some never.
                    found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, entry.path))
    total = sum(size for _, size, _ in found)
    if total <= limit:
        return
    for _, size, path in sorted(found):
        if total <= (1 - ROOM) * limit:
            break
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)
            total -= size
