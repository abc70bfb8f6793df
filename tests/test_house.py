"""The rules of the house: which rooms of the package may import which, and how functions are called."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_jax"

# What each room may import, beside itself. Nothing imports upwards, so there is no circle.
GROUND = {"types", "settings", "logprobs"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "settings": {"errors"},
    "hub": {"errors"},
    "people": {"errors", "settings", "hub"},  # neither `types` nor anything else that imports JAX
    "types": {"errors", "settings"},
    "logprobs": {"types", "settings", "devices"},
    "devices": {"types", "settings"},
    "algorithms": GROUND | {"devices"},
    "data": {"types", "settings", "devices", "people"},
    "models": GROUND | {"devices", "data", "hub"},
    "rollouts": GROUND | {"devices", "algorithms", "data", "models", "people"},  # of `people`, the client of endpoints
    "evaluation": GROUND | {"devices", "data", "models", "rollouts", "algorithms"},
    "serving": GROUND | {"devices", "data", "models", "rollouts", "people"},  # of `people`, where servers listen
    "runs": {"types", "settings", "hub", "devices", "people"},  # a resume compares the labels that it reads
    "analysis": GROUND | {"devices", "models"},
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """The room that each import of the package leads to, and its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "rlhf_jax":
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_jax."):
            yield node.module.split(".")[1], node.lineno
        elif isinstance(node, ast.Import):
            yield from (
                (alias.name.split(".")[1], node.lineno) for alias in node.names if alias.name.startswith("rlhf_jax.")
            )


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_is_known():
    assert {room(path) for path in SOURCES} == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_downwards(path: Path):
    allowed = MAY_IMPORT[room(path)] | {room(path)}
    wrong = [f"line {line}: {other}" for other, line in imported_rooms(path) if other not in allowed]
    assert not wrong, f"{path.relative_to(PACKAGE.parent)} may import {sorted(allowed)}, but imports {wrong}"


@pytest.mark.slow
def test_what_few_runs_need_is_not_imported_with_every_experiment():
    code = (
        "import sys, experiments.assistant, experiments.distill, experiments.grpo, experiments.kto, experiments.rounds;"
        "lazy = 'datasets gcsfs gguf lm_eval matplotlib pandas pyarrow sklearn starlette torch uvicorn wandb'.split();"
        "found = [name for name in lazy if name in sys.modules]; assert not found, found"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_no_circle():
    """Rooms can be put in an order in which each imports earlier ones alone."""
    built: set[str] = set()
    while left := MAY_IMPORT.keys() - built:
        ready = {name for name in left if MAY_IMPORT[name] <= built}
        assert ready, f"{sorted(left)} import each other"
        built |= ready


# Calls ----------------------------------------------------------------------------------------------------------------

PARAMETERS = 8  # at most, of a function, beside `axis`, which a layout binds
LONGER = {  # functions with more, and the reason
    "rlhf_jax/algorithms/ppo.py:train_step": "it takes two networks, and text",
    "rlhf_jax/algorithms/distillation.py:train_step": "it takes two networks, and the parameters of the other",
    "scripts/tpu_compile.py:ranking_batches": "it stands for `pipeline.rankings`, and is told the number of responses",
}
SPREADING = {  # functions that hand a dict of arguments on, and the reason
    "rlhf_jax/models/transformer.py:bind.apply": "hands a module's arguments on",
    "rlhf_jax/models/transformer.py:part": "hands a network's arguments on",
    "rlhf_jax/models/lora.py:with_base": "hands a network's arguments on",
    "rlhf_jax/runs/cli.py:hand_down": "`decided` is written out where it is called, an argument a line",
    "rlhf_jax/runs/gcs.py:_mirrors": "copies any dataclass",
    "rlhf_jax/models/families.py:Family.read": "a family is a row of a table: fields of the config by name",
    "rlhf_jax/models/rope_fields.py:_read_scaling": "a scaling is a row of a table: its fields by name",
    "rlhf_jax/models/families.py:_expresses": "a family is a row of a table: settings of `transformers` by name",
    "rlhf_jax/models/config_json.py:hf_config": "a family is a row of a table: settings of `transformers` by name",
    "rlhf_jax/people/rules.py:newest": "the rules as they were stored, by name",
    "rlhf_jax/people/record.py:unfinished": "the settings as they were stored, by name",
    "rlhf_jax/people/administration.py:_rules": "a form has the names of the rules that it changes",
    "rlhf_jax/data/builders.py:_fetching.send_soon": "hands the arguments of a request on",
    "experiments/studies/symptoms.py:collect_cooler": "hands the arguments of `rollout.collect` on",
    "experiments/studies/symptoms.py:collect_unseen": "hands the arguments of `rollout.collect` on",
    "scripts/bench.py:with_field": "a file of sizes names the field that it changes",
    "rlhf_jax/data/world/world.py:World._prompt": "the solution of a question takes the numbers in it by name",
}


DICTS = {  # functions with a dict of anything, and the reason
    "rlhf_jax/analysis/report/__init__.py:_episode": "an object of the page's JSON",
    "rlhf_jax/models/directory.py:_placed": "a tree of parameters",
    "rlhf_jax/models/rope_fields.py:_read_scaling": "the fields of a scaling, out of a config.json",
    "rlhf_jax/models/families.py:Family.read": "the fields of a config, out of a config.json",
    "rlhf_jax/models/families.py:Family.write": "the settings of a config.json",
    "rlhf_jax/models/gguf_file.py:File._config_json": "the settings of a config.json",
    "rlhf_jax/models/config_json.py:hf_config": "the settings of a config.json",
    "rlhf_jax/runs/cli.py:_flags": "the values of flags by name, for a message",
    "experiments/evaluate.py:main": "a result, which becomes JSON",
    "experiments/published/gsm8k_evaluate.py:main": "a result, which becomes JSON",
    "experiments/reward.py:record": "a result, which becomes JSON",
    "scripts/bench.py:main": "a result, which becomes JSON",
}


class Calls(ast.NodeVisitor):
    """The long signatures of a file, its dicts of anything and those spread into calls, by the function's name."""

    def __init__(self, path: Path, root: Path = ROOT):
        self._file, self._names = str(path.relative_to(root)), list[str]()
        self.long, self.spread, self.dicts = (list[tuple[str, str]]() for _ in range(3))  # (function, what to tell)
        self.visit(ast.parse(path.read_text()))

    def _within(self, node: ast.AST, name: str) -> None:
        self._names.append(name)
        self.generic_visit(node)
        self._names.pop()

    def _tell(self, found: list[tuple[str, str]], node: ast.expr | ast.stmt, what: str) -> None:
        function = f"{self._file}:{'.'.join(self._names)}"
        found.append((function, f"{self._file}:{node.lineno}: {what}"))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._within(node, node.name)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        every = node.args
        names = [x.arg for x in (*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg) if x]
        count = len(names) - (names[:1] in (["self"], ["cls"])) - ("axis" in names)
        if count > PARAMETERS:
            self._names.append(node.name)
            self._tell(self.long, node, f"{node.name} has {count} parameters, more than {PARAMETERS}")
            self._names.pop()
        self._within(node, node.name)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if ast.unparse(node.annotation) in ("dict", "dict[str, Any]"):
            self._tell(self.dicts, node, f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        fills_text = isinstance(node.func, ast.Attribute) and node.func.attr == "format"
        for keyword in node.keywords:
            if keyword.arg is None and not fills_text:
                self._tell(
                    self.spread, keyword.value, f"**{ast.unparse(keyword.value)} in a call of {ast.unparse(node.func)}"
                )
        self.generic_visit(node)


EVERY = [Calls(path) for room in ("rlhf_jax", "experiments", "scripts") for path in sorted((ROOT / room).rglob("*.py"))]


def test_functions_have_few_parameters():
    """More are a dataclass that has no name yet."""
    long = [pair for calls in EVERY for pair in calls.long]
    wrong = [what for function, what in long if function not in LONGER]
    assert not wrong, "\n".join(wrong)
    assert len(LONGER) <= 3 and LONGER.keys() <= {function for function, _ in long}


def test_calls_are_written_out():
    """An argument a line, which a type checker reads: settings do not travel as a dict that is spread into a call."""
    spread = [pair for calls in EVERY for pair in calls.spread]
    wrong = [what for function, what in spread if function not in SPREADING]
    assert not wrong, "\n".join(wrong)
    assert SPREADING.keys() <= {function for function, _ in spread}


def test_settings_are_no_dict():
    """A field or local of the type dict[str, Any] is JSON, a tree of arrays or a table of a family, never settings."""
    dicts = [pair for calls in EVERY for pair in calls.dicts]
    wrong = [what for function, what in dicts if function not in DICTS]
    assert not wrong, "\n".join(wrong)
    assert DICTS.keys() <= {function for function, _ in dicts}


def test_what_breaks_the_rules_is_found(tmp_path: Path):
    path = tmp_path / "wrong.py"
    path.write_text(
        "class A:\n"
        "    def f(self, a, b, c, d, /, e, f, *g, h, **i):\n"
        "        given: dict[str, Any] = {'x': 1}\n"
        "        return lambda: Config(1, **given, **{'y': 2})\n"
        "def fine(a, b, c, d, e, f, *, g, h):\n"
        "    return '{a}'.format(**a), Config(*b, x=1)\n"
    )
    found = Calls(path, tmp_path)
    assert found.dicts == [("wrong.py:A.f", "wrong.py:3: given: dict[str, Any]")]
    assert found.long == [("wrong.py:A.f", "wrong.py:2: f has 9 parameters, more than 8")]
    assert found.spread == [
        ("wrong.py:A.f", "wrong.py:4: **given in a call of Config"),
        ("wrong.py:A.f", "wrong.py:4: **{'y': 2} in a call of Config"),
    ]
