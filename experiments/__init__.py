"""One runnable file an experiment. To fork one, copy it, or import its Config and main and change a default."""

import importlib.util
import sys

if importlib.util.find_spec("jax") is None:
    raise ModuleNotFoundError(
        f"{sys.executable} has no jax: activate the environment of this repository (source .venv/bin/activate), which"
        " scripts/quickstart.sh creates, or install the packages (pip install -e .)"
    )
