"""Every command in README.md and docs/ runs as it stands, or there is a reason why it does not run here.

The commands of a page run one after the other, in a folder that has what a reader has by then: the runs of a
quickstart, files of the names and shapes that the pages speak of, and labels of people. They run in this process, which
shares compiled programs among them; they are smaller than a reader's (`small`), and draw no curves.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import threading
import traceback
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

import pyarrow
from huggingface_hub import constants
from pyarrow import parquet

from rlhf_jax.people import network
from rlhf_jax.people.items import Item
from rlhf_jax.people.store import Store
from rlhf_jax.rollouts import judge
from rlhf_jax.runs import checkpoint, cli, plots
from tests import hub_server
from tests.people import endpoints, labelling

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PARSE = cli.parse
NAMES = r"(.*python -m )?\S+"  # in backticks: a program, rather than a command
OURS = r"(?:\w+=\S* )*(?:(?:\.venv/bin/)?python3? |pytest |scripts/\w+\.(?:sh|py)\b)"
FLAGGED = r"(\.venv/bin/)?python (-m experiments\.|scripts/(bench|guesses)\b)"

# Beginnings of commands that do not run here, and why. Flags of experiments among them are read all the same.
LEFT_OUT = {
    r"(pip|git|python3?(\.\d+)? -m (venv|pip)|\.venv/bin/pip)\b": "installs from the network",
    r"(cat|gcloud|xpk|docker|kubectl|sbatch|ssh|tail|export|while|scripts/tpu\.sh)\b": "needs other machines",
    r"source ": "enters the environment",
    r"(lm_eval|jupyter)\b": "is a program of others",
    r".*(\.\.\.|experiments\.NAME|NAME=PYTHON)": "is an outline",
    r".*(pytest|scripts/test\.sh|scripts/mutate\.py|tests\.\w+)\b": "runs tests",
    r"scripts/docs\.sh": "runs in tests/test_site.py",
    r"scripts/quickstart\.sh": "ran for the fixture `done`",
    r".*(scripts/(studies|survive|scaling|processes|bench|guesses)\b|studies\.)": "takes minutes or hours",
    r".*lessons\.py (measure|stages)": "makes figures of these pages",
    r".*scripts/tpu_compile\.py": "needs libtpu",
    r".*(hub:|\.gguf\b|(cot|bbh|sst):|papers\.sentiment)": "reads published files",
    r"JAX_PROCESS_ID=": "runs in tests/devices/test_hosts.py, in two processes",
    r".*gpt3-175b": "asks for more memory than there is, to show what a run says then",
    r".*experiments\.rounds": "waits for people, as in tests/people/test_loop_pages.py",
    r".*--judge\.model": "needs a model that can judge",
    r".*--devices\.fsdp": "runs in tests/experiments/test_quickstart.py, on a mesh",
    r".*experiments\.instruct": "prepares 14,000 rows first, and runs in tests/experiments/test_instruct.py",
    r".*experiments\.lm_eval": "runs in tests/evaluation/test_harness.py, where the extra eval is installed",
}

SIZES = {  # of every setting of such a name that is a whole number
    "steps": 2,
    "epochs": 1,
    "warmup": 1,
    "batch": 16,
    "text_batch": 16,
    "minibatches": 1,
    "prompts": 16,
    "held_out": 8,
    "pairs": 8,
    "texts": 40,
    "questions": 4,
    "vocab_size": 512,
    "prompt_length": 40,
    "max_new_tokens": 8,
    "length": 128,
    "columns": 64,
    "limit": 8,
    "token_samples": 8,
    "rows": 2,
}


def small(config: Any) -> Any:
    """The settings of an experiment at sizes for a test, nested ones too; it starts over where another command ran."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, checkpoint.Config):
            changes[field.name] = dataclasses.replace(value, resume="never")
        elif isinstance(value, judge.Config):
            continue  # has no sizes of its own
        elif dataclasses.is_dataclass(value):
            changes[field.name] = small(value)
        elif field.name in SIZES and type(value) is int:
            changes[field.name] = SIZES[field.name]
        elif isinstance(value, str) and "world:" in value:
            changes[field.name] = re.sub(r"rows=\d+", "rows=100", value)
    return dataclasses.replace(config, **changes)


# Pages ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: str
    line: int
    text: str

    @property
    def reason(self) -> str | None:
        """Why it does not run here; None if it runs."""
        return next((reason for pattern, reason in LEFT_OUT.items() if re.match(pattern, self.text)), None)

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def kind(self) -> tuple[str, ...]:
        """Of each kind one command runs. An experiment's kind is its flags, but where --out keeps its result."""
        words = self.words
        if "FULL_SIZE" in os.environ or "--out" in words or not re.search(r"experiments\.\w+ .*--data", self.text):
            return tuple(words)
        return tuple(word for word in words if word.startswith(("experiments.", "--")))


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page, in order: each line of its fences `sh`, and each command in backticks."""
    text = page.read_text()
    text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    name = str(page.relative_to(ROOT))
    for code in re.finditer(r"^```(\w*)\n(.*?)^```|`([^`]+)`", text, re.DOTALL | re.MULTILINE):
        if code[3]:
            span = " ".join(code[3].split())
            if re.match(OURS, span) and not re.fullmatch(NAMES, span):
                yield Command(name, text.count("\n", 0, code.start()) + 1, span)
        elif code[1] == "sh":
            for line in re.finditer(r"(?:.*\\\n)*.+", code[2]):
                number = text.count("\n", 0, code.start(2) + line.start()) + 1
                yield Command(name, number, re.sub(r"\\\n *", "", line[0]))


COMMANDS = [command for page in PAGES for command in commands(page)]


def test_every_command_is_known():
    """It runs here, or there is a reason; and each reason is that of a command."""
    unknown = [command for command in COMMANDS if not command.reason and not re.match(OURS, command.text)]
    assert not unknown
    assert {command.reason for command in COMMANDS} == {None, *LEFT_OUT.values()}
    assert sum(command.reason is None for command in COMMANDS) > 50


# What a reader has ----------------------------------------------------------------------------------------------------


def lines(path: str, rows: list[dict[str, Any]]) -> None:
    """Write a file of rows, by its ending."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


LONG = "It is what it is, and not what it is not. " * 2  # so that a few of them fill a batch


def write_files() -> None:
    """The files that the pages name."""
    several = range(40)
    pairs = [{"prompt": f"Is {n} odd?", "chosen": "Yes.", "rejected": "No.", "subset": "honest"} for n in several]
    talks = [f"\n\nHuman: Is {n} odd?\n\nAssistant:" for n in range(160)]  # of which pages hold a tenth out
    hh = [{"chosen": f"{talk} Yes.", "rejected": f"{talk} No."} for talk in talks]
    told = [{"prompt": f"Is {n} odd?", "completion": LONG} for n in several]
    ranked = [
        {"prompt": f"Say {n}.", "responses": [f"{n}.", "No.", "What?", "Why?"], "ranks": [0, 1, 1, 2]} for n in several
    ]
    gsm8k = [{"question": f"Has he {n} eggs?", "answer": f"{LONG}\n#### {n}"} for n in several]
    dolly = [{"instruction": f"Say {n}.", "context": "", "response": LONG} for n in several]
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": LONG}]
    step = {"completions": [{"text": "Add them.", "rating": 1}], "human_completion": None, "chosen_completion": 0}
    solved = {
        "question": {"problem": "What are 2 and 3?", "ground_truth_answer": "5"},
        "label": {"steps": [step], "finish_reason": "solution"},
    }
    bench = [{"input": f"Is {n} odd?", "target_scores": {"Yes.": 1, "No.": 0}} for n in several]
    asked = [{"question": f"Is {n} odd?", "answer": "yes", "options": ["yes", "no"]} for n in several]
    battles = [{"prompt": "Say 1.", "responses": ["1.", "2."], "models": ["a", "b"], "task": "arena"}]
    rows = {
        "PATH.jsonl": gsm8k,
        "PATH.jsonl.gz": hh,
        "train.jsonl.gz": hh,
        "FILE.jsonl": told,
        "a.jsonl": told,
        "b.parquet": told,
        "rows.jsonl": told,
        "demonstrations.jsonl": told,
        "prompts.jsonl": told,
        "rankings.jsonl": ranked,
        "answers.jsonl": ranked,
        "more.jsonl": ranked,
        "battles.jsonl": battles,
        "pairs.jsonl": pairs,
        "questions.jsonl": asked,
        "dolly.parquet": dolly,
        "talk/1.json": [{"id": f"x_{n}", "conversations": turns} for n in several],
        "phase2_train.jsonl": [solved] * 40,
        "train.jsonl": gsm8k,
    }
    for path, some in rows.items():
        lines(path, some)
    Path("hhh_alignment").mkdir()
    Path("hhh_alignment/honest.json").write_text(json.dumps({"examples": bench}))
    Path("PATH.txt").write_text("\n<|endoftext|>\n".join(f"Once upon a time there were {n} cats." for n in range(200)))
    Path("rubric.txt").write_text("Is the answer kind?")


def label(db: Path) -> None:
    """A store of people's labels: rankings, demonstrations and the verdicts of an arena."""
    db.parent.mkdir(parents=True)
    with Store(db) as store:
        store.set_rules(labelling.RULES)
        ann = labelling.person(store, "ann")
        models = ("runs/quickstart/sft/model", "runs/quickstart/ppo/model")
        store.add(Item(f"Is {n} odd?", ("Yes.", "No.", "Perhaps.")) for n in range(20))
        store.add(Item(f"Is {n} odd?", ("Yes.", "No."), "arena", models) for n in range(4))
        store.add(Item(f"Who are you, {n}?", (), "demonstrate") for n in range(40))
        while held := store.task(ann):
            match held.task:
                case "rank":
                    given: dict[str, Any] = {"ranks": [*range(len(held.responses))]}
                case "arena":
                    given = {"verdict": "first"}
                case _:
                    given = {"text": LONG}
            store.submit(ann, held.id, f"submission {held.id}", given, 1.0)


@pytest.fixture(scope="module")
def judging(done: tuple[Any, dict], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a model that judges, while the working directory is the folder in which the commands run.

    Models of the Hub are in the client's cache.
    """
    cfg, _ = done
    here = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch, endpoints.answering() as (stub, address):
        stub.names, stub.text = ["judge"], "Score: 7"
        patch.chdir(here)
        shutil.copytree(cfg.out, "runs/quickstart")
        shutil.copytree(cfg.out / "data", "runs/data")
        for name in ("pretrain", "sft", "rank", "reward", "ppo"):
            shutil.copytree(cfg.out / name, Path("runs") / name)
        shutil.copytree(cfg.out / "ppo", "runs/quickstart/grpo")
        shutil.copytree(cfg.out / "ppo", "runs/mine/ppo")
        for name in ("DIR", "runs/a/model", "runs/b/model", "runs/c/model"):
            shutil.copytree(cfg.out / "sft" / "model", name)
        for name in ("A", "B", "C"):
            shutil.copytree(cfg.out / "reward" / "model", name)
        write_files()
        label(Path("runs/people/people.db"))
        files = {path.name: path.read_bytes() for path in (cfg.out / "sft" / "model").iterdir()}
        for name in ("SmolLM2-135M", "SmolLM2-1.7B-Instruct"):
            hub_server.cached(here / "cache", f"HuggingFaceTB/{name}", files)
        patch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(cli, "parse", lambda default, args=None: small(PARSE(default, args)))
        patch.setattr(plots, "curves", lambda *args: None)  # half a second of each run
        yield address


# Running --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def interrupted(port: int) -> Iterator[None]:
    """Within, this process gets control-C as soon as its server answers."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60).close()
            except urllib.error.HTTPError:
                pass  # an answer, too
            except OSError:
                continue
            os.kill(os.getpid(), signal.SIGINT)
            return

    thread = threading.Thread(target=watch)
    terminated = signal.getsignal(signal.SIGTERM)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, terminated)


def program(words: list[str]) -> tuple[str, list[str]]:
    """The module or script that a command runs, and its arguments; one of Bash runs the module that it names last."""
    if words[0].endswith(".sh"):
        return re.findall(r' -m (\S+) "\$@"$', (ROOT / words[0]).read_text(), re.MULTILINE)[-1], words[1:]
    if words[0].endswith("python"):
        words = words[2:] if words[1] == "-m" else words[1:]
    return words[0], words[1:]


def execute(name: str, arguments: list[str]) -> int:
    """Run a module or script in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(logging.getLogger("uvicorn"), "handlers", [])  # a server adds some, to this stderr
        warnings.simplefilter("ignore", RuntimeWarning)  # that a module is there already
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(sys, "stdin", io.StringIO("Who are you?\n"))
        try:
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def run(command: Command, judging: str) -> int:
    """Run a command, a server until it answers; its exit status."""
    name, arguments = program(command.words)
    arguments = [argument.replace("http://127.0.0.1:8001", judging) for argument in arguments]
    serves = name == "experiments.serve" or (name == "rlhf_jax.people" and arguments[:1] not in OTHERS)
    if not serves:
        return execute(name, arguments)
    with network.listening("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with interrupted(port):
        return execute(name, [*arguments, "--port", str(port)])


OTHERS = [["export"], ["import"], ["invite"]]  # what scripts/people.sh does beside serving
RAN: set[tuple[str, ...]] = set()  # kinds, of any page


TRAINING = {"docs/scores.md", "docs/learn/over-optimisation.md"}  # pages that train several reward models
RUNNING = [
    pytest.param(page, marks=[pytest.mark.full] if page in TRAINING else [])
    for page in dict.fromkeys(command.page for command in COMMANDS if command.reason is None)
]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING)
def test_the_commands_of_a_page_run(page: str, judging: str, capfd: pytest.CaptureFixture):
    for command in COMMANDS:
        if command.page != page or command.reason or command.kind in RAN:
            continue
        RAN.add(command.kind)
        status = run(command, judging)
        said = "".join(capfd.readouterr())
        assert status == 0, f"{command.page}:{command.line}: status {status}\n{command.text}\n{said}"


@pytest.mark.slow
def test_flags_of_what_does_not_run_are_flags(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    read: list[Any] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "run", lambda main, default, args=None: read.append(PARSE(default, args)))
    for command in COMMANDS:
        if command.reason in (None, "is an outline") or not re.match(FLAGGED, command.text):
            continue
        status = execute(*program(command.words))
        assert status == 0, f"{command.page}:{command.line}\n{command.text}\n{capfd.readouterr().err}"
    assert len(read) > 10
