# shellcheck shell=bash
# Sourced by the other scripts: finds an interpreter, and keeps a virtual environment for it beside the code.
#
# PYTHON chooses the interpreter: a command, or a path. The default one lives in .venv, any other in .venv-<version>.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Prints the path of the interpreter called $1 if it runs, looking also among those of pyenv.
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

# Sets `python` and `venv`.
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

# Makes `venv` hold this package and what it needs, with the development extra if $1 is "dev" and without if it is "run".
# Does nothing if that is so: a stamp says for which manifest, interpreter and place it was installed, and a look inside
# says whether it still works.
set_up() {
    local kind=$1 extra='' stamp
    choose_python
    stamp=$(cd "$root" && { cat setup.cfg pyproject.toml && "$python" -VV && pwd; } | cksum)
    if [[ $(cat "$venv/.made-dev" 2>/dev/null) == "$stamp" ]]; then
        kind=dev # which serves for everything
    fi
    if [[ $(cat "$venv/.made-$kind" 2>/dev/null) == "$stamp" ]]; then
        if works "$kind"; then return; fi
        rm -rf "$venv"
    fi
    echo "Setting up ${venv#"$root"/}, once; this takes a few minutes" >&2
    rm -f "$venv"/.made-*
    if [[ $("$venv/bin/python" -VV 2>&1) != $("$python" -VV) ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear "$venv"
    fi
    if [[ $kind == dev ]]; then extra='[dev]'; fi
    # uv is many times faster; pip knows more ways to configure where packages come from.
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
    "$venv/bin/python" -m pip install -qq uv
    VIRTUAL_ENV=$venv "$venv/bin/python" -m uv pip install -q --editable "$root$extra" ||
        "$venv/bin/python" -m pip install -qq --editable "$root$extra"
    works "$kind" || fail "${venv#"$root"/} does not work; delete it and run this again"
    echo "$stamp" >"$venv/.made-$kind"
}

# Whether `venv` runs, and has every package that the manifest asks for.
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

# On a CPU, XLA allocates and frees each step's buffers: let the allocator keep them, in huge pages (a fifth faster).
keep_memory() {
    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
}

fail() {
    echo "error: $*" >&2
    exit 2
}
