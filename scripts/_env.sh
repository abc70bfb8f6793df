# shellcheck shell=bash
# Sourced by the other scripts: finds a Python interpreter and maintains a virtual environment for it in the repository.
#
# PYTHON names the interpreter, as a command or a path. Its environment is .venv-<version>; without PYTHON it is .venv.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Prints the path of the interpreter $1 if it runs and is new enough; also searches pyenv's versions.
find_python() {
    local candidate
    for candidate in "$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/${1#python}"*/bin/python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    return 1
}

# Sets `python` and `venv`, the interpreter and the environment to use.
choose_python() {
    local name
    if [[ -n ${PYTHON:-} ]]; then
        python=$(find_python "$PYTHON") || fail "PYTHON=$PYTHON is not a Python of version 3.11 or newer"
        venv=$root/.venv-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        return
    fi
    for name in python3 python3.13 python3.12 python3.11; do
        if python=$(find_python "$name"); then
            venv=$root/.venv
            return
        fi
    done
    fail "needs Python 3.11 or newer; name one by PYTHON=..."
}

# Installs this package and its dependencies into `venv`, with the extra "dev", "docs" or "people" if $1 is that, without if
# it is "run". The site has an environment of its own, unless that of "dev" is there. Does nothing if they are installed: a stamp records the manifest, interpreter and folder of the installation, and
# `works` checks that it is still intact.
set_up() {
    local kind=$1 extra='' stamp
    choose_python
    stamp=$(cd "$root" && { cat setup.cfg pyproject.toml && "$python" -VV && pwd; } | cksum)
    if [[ $(cat "$venv/.made-dev" 2>/dev/null) == "$stamp" ]]; then
        kind=dev # it includes what the others need
    elif [[ $kind == docs ]]; then
        venv=$venv-docs
    elif [[ $kind == run && $(cat "$venv/.made-people" 2>/dev/null) == "$stamp" ]]; then
        kind=people
    fi
    if [[ $(cat "$venv/.made-$kind" 2>/dev/null) == "$stamp" ]]; then
        if works "$kind"; then return; fi
        rm -rf "$venv"
    fi
    if [[ $kind != run ]] && grep -qsxF -- "$stamp" "$venv"/.made-*; then
        echo "Adding what ${0##*/} needs (extra $kind) to ${venv#"$root"/}, once; this takes about a minute" >&2
    else
        echo "Setting up ${venv#"$root"/}, once; this takes a few minutes" >&2
    fi
    rm -f "$venv"/.made-*
    if [[ $("$venv/bin/python" -VV 2>&1) != $("$python" -VV) ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear "$venv"
    fi
    if [[ $kind != run ]]; then extra="[$kind]"; fi
    # uv is many times faster; pip, the fallback, supports more ways to configure package sources.
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
    "$venv/bin/python" -m pip install -qq uv
    VIRTUAL_ENV=$venv "$venv/bin/python" -m uv pip install -q --editable "$root$extra" ||
        "$venv/bin/python" -m pip install -qq --editable "$root$extra"
    works "$kind" || fail "${venv#"$root"/} does not work; delete it and run this again"
    echo "$stamp" >"$venv/.made-$kind"
}

# Succeeds if `venv` runs and has every package that the manifest requires.
works() {
    "$venv/bin/python" - "$1" >/dev/null 2>&1 <<'PYTHON'
import importlib.metadata, re, sys

for requirement in importlib.metadata.requires("rlhf_jax"):
    name, _, condition = requirement.partition(";")
    if not condition or f'"{sys.argv[1]}"' in condition:
        files = importlib.metadata.files(re.match(r"[\w.-]+", name)[0])
        assert files and all(file.locate().exists() for file in files[:9])
PYTHON
}

# On a CPU, XLA allocates and frees buffers in every step: let the allocator keep them, in huge pages (a fifth faster).
keep_memory() {
    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
}

fail() {
    echo "error: $*" >&2
    exit 2
}
