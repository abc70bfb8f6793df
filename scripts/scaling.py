"""Compiles what docs/scaling.md tells of, and renews its tables.

    python scripts/scaling.py --results runs/scaling.jsonl

Each case is a run of scripts/tpu_compile.py in a process of its own, which may take hours: results that are there
already are not made again, `--only NAME` makes those of one table. What took longer than `--timeout` seconds is told of
as such. Tables stand in the page between two comments with the name of the table.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
COMPILE = ROOT / "scripts" / "tpu_compile.py"
BIG = "--compute.dtype bfloat16 --compute.frozen bfloat16 --compute.remat full --compute.chunk 512"
ROWS, SHORT = "--text None --length 2048", "--text None --length 1024"  # of fine-tuning, and of GPT-2's context
ROLLS = "--prompt-length 1024 --max-new-tokens 1024 --text-length 2048"  # of PPO

DEFAULTS = (
    *("pretrain", "sft", "rank", "reward", "ppo", "ppo_no_ptx", "ppo_gold", "grpo", "rloo", "dpo", "best_of_n"),
    *("rejection", "evaluate"),
)
SLICES = {  # by model: slices of each kind on which fine-tuning is compiled
    "gpt2": ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"),
    "gpt3-1.3b": ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"),
    "llama3-8b": ("v4:2x2x4", "v5e:4x8", "v5p:2x2x4", "v6e:4x4"),
    "llama3-70b": ("v4:4x4x8", "v5e:16x16", "v5p:4x4x4", "v6e:8x8"),
    "gpt3-175b": ("v4:4x8x8", "v5e:16x16", "v5p:4x4x4", "v6e:16x16"),
}
TENSOR = {  # chips that share each row, by model and kind of chip; else one
    "llama3-70b": {"v4": 4, "v5e": 4, "v5p": 4, "v6e": 4},
    "gpt3-175b": {"v4": 4, "v5e": 16, "v5p": 4, "v6e": 16},
}
HOSTS = "v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16"  # of four chips each: 1, 4, 16 and 64 hosts
RECIPES = {  # stages, by the slice on which their train steps are compiled
    "v5e:2x4": (
        *(f"tldr_stiennon2020:{stage}-1.3b" for stage in ("sft", "reward", "ppo")),
        *(f"instructgpt:{stage}-1.3b" for stage in ("sft", "init")),
        *(f"tldr_huang2024:{stage}-1b" for stage in ("sft", "reward", "ppo")),
        *(f"ziegler2019:{stage}-{task}" for task in ("books", "cnndm", "tldr") for stage in ("reward", "ppo")),
    ),
    "v5p:2x2x2": (
        *(f"tldr_stiennon2020:{stage}-6.7b" for stage in ("sft", "reward", "ppo")),
        *(f"tldr_huang2024:{stage}-{size}" for size in ("2.8b", "6.9b") for stage in ("sft", "reward", "ppo")),
        *(f"instructgpt:{stage}" for stage in ("sft-6b", "init-6b", "reward", "ppo-1.3b", "ppo-6b")),
    ),
    "v5p:2x2x4": ("tulu3:dpo-8b", *(f"deepseekmath:{stage}-7b" for stage in ("sft", "reward", "grpo"))),
    "v5p:4x4x4": ("instructgpt:sft-175b", "instructgpt:init-175b", "tulu3:dpo-70b"),
}
# Micro-batches of a stage; PPO-ptx has eight rows of text an episode, and GRPO 64 answers a question.
PARTS = {
    "instructgpt:ppo": 8,
    "instructgpt:reward": 4,
    "deepseekmath:grpo": 16,
    "deepseekmath": 4,
    "tulu3": 4,
    **dict.fromkeys(("ziegler2019:reward-cnndm", "ziegler2019:reward-tldr"), 2),
}
# Answers to a prompt in rankings, where tpu_compile.py has 9.
RESPONSES = {"ziegler2019": 4, "tldr_huang2024": 2, "deepseekmath": 2, "tulu3": 2}
ROWS_OF = {"v5p:2x2x4": 16}  # parts of a batch on these slices; on others at most 8, for batches of few rows


def cases() -> Iterator[tuple[str, str, str, str]]:
    """Table, experiment, topology, and the experiment's flags."""
    for name in DEFAULTS:
        yield "defaults", name, "v5e:2x4", ""
    for model, slices in SLICES.items():
        for topology in slices:
            n, tensor = chips(topology), TENSOR.get(model, {}).get(topology.partition(":")[0], 1)
            mesh = f"--batch {n // tensor} --devices.fsdp {n // tensor} --devices.tensor {tensor}"
            yield "sizes", "sft", topology, f"--init {model} {SHORT if model == 'gpt2' else ROWS} {mesh} {BIG}"
    for topology in HOSTS:
        mesh = f"--batch {chips(topology)} --devices.fsdp {chips(topology)}"
        yield "hosts", "sft", topology, f"--only train --init gpt3-1.3b {ROWS} {mesh} {BIG}"
    both = "--init llama3-8b --reward llama3-8b"
    yield "ppo", "ppo", "v5p:2x2x4", f"{both} {ROLLS} --batch 128 --text-batch 16 --devices.fsdp 16 {BIG}"
    for topology, stages in RECIPES.items():
        for stage in stages:
            rows = min(chips(topology), ROWS_OF.get(topology, 8))
            mesh = f"--devices.fsdp {rows} --devices.tensor {chips(topology) // rows}"
            own = 4 if topology == "v5e:2x4" else 1
            parts = next((n for name, n in PARTS.items() if stage.startswith(name)), own)
            if parts > 1:
                mesh += f" --devices.microbatches {parts}"
            if responses := RESPONSES.get(stage.partition(":")[0]):
                mesh += f" --responses {responses}"
            yield "recipes", stage, topology, f"--only train {mesh} {BIG}"
    for topology in ("v5p:4x4x4", "v5p:4x4x8"):
        rows = chips(topology) // 4  # of which each has as many parts as it has episodes of an update
        mesh = f"--devices.fsdp {rows} --devices.tensor 4 --devices.microbatches {64 // rows}"
        yield "instructgpt", "instructgpt:ppo-175b", topology, f"{mesh} {BIG}"


def chips(topology: str) -> int:
    n = 1
    for side in re.findall(r"\d+", topology.partition(":")[2]):
        n *= int(side)
    return n


def made(experiment: str, topology: str, flags: str, timeout: float) -> dict:
    """The report of tpu_compile.py on one case."""
    command = [sys.executable, str(COMPILE), "--experiment", experiment, "--topology", topology, *flags.split()]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        return {"status": None, "rows": _rows(out.decode() if isinstance(out, bytes) else out)}
    if done.returncode > 1:
        sys.exit(f"{experiment} {topology}: {done.stderr.splitlines()[-1]}")
    return {"status": done.returncode, "rows": _rows(done.stdout)}


def _rows(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("|")]


def page(text: str, results: list[dict], seconds: float) -> str:
    """The page with the tables that these results are of."""
    for name in dict.fromkeys(result["table"] for result in results):
        lines: list[str] = []
        for result in (result for result in results if result["table"] == name):
            model = re.search(r"--init (\S+)", result["flags"])
            what = " ".join([result["experiment"], *model.groups()] if model else [result["experiment"]])
            head, rule, *rows = result["rows"] or ["", ""]
            if head and not lines:
                lines = ["| what | slice " + head, "| --- | --- " + rule]
            lines += [f"| {what} | {result['topology']} {row}" for row in rows]
            if result["status"] is None:
                lines.append(f"| {what} | {result['topology']} | the rest not compiled within {seconds:.0f} s |")
        mark = f"<!-- {name} -->"
        text, count = re.subn(f"(?s){mark}.*?{mark}", lambda _: "\n".join([mark, *lines, mark]), text)  # noqa: B023
        if count != 1:
            sys.exit(f"{PAGE} has no place for the table {name}: write {mark} twice")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "scaling.jsonl", help="kept from run to run")
    parser.add_argument("--only", help="the table to make")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for a case")
    own = parser.parse_args()
    own.results.parent.mkdir(parents=True, exist_ok=True)
    lines = own.results.read_text(encoding="utf-8").splitlines() if own.results.exists() else []
    known = {tuple(result["case"]): result for result in map(json.loads, lines)}
    results = []
    for case in cases():
        table, experiment, topology, flags = case
        if case not in known and own.only in (None, table):
            print(f"{table}: {experiment} {topology} {flags}", flush=True)
            known[case] = {"case": case, **made(experiment, topology, flags, own.timeout)}
            with own.results.open("a") as file:
                file.write(json.dumps(known[case]) + "\n")
        if case in known:
            where = {"table": table, "experiment": experiment, "topology": topology, "flags": flags}
            results.append(known[case] | where)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results, own.timeout))


if __name__ == "__main__":
    main()
