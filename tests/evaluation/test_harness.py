"""The adapter of lm-evaluation-harness; where PyTorch is there, against the harness's own backend for it.

It compares on a model directory and tasks of yours too:

    HARNESS_MODEL=DIR HARNESS_TASKS=a.yaml,b.yaml JAX_DISABLE_MOST_OPTIMIZATIONS=false \
        pytest tests/evaluation/test_harness.py -k "parity and HARNESS_MODEL" -s
"""

import dataclasses
import importlib.util
import json
import os
import re
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import processors

from experiments import lm_eval as experiment
from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.devices import parallel
from rlhf_jax.evaluation import harness
from rlhf_jax.types import InputError
from tests import tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HAS_HARNESS = pytest.mark.skipif(bool(harness.MISSING), reason="needs lm-eval (the extra eval)")
HAS_TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch (the extra parity)")
THEIRS = pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports

ONE = parallel.Pmap(tuple(jax.devices()[:1]))
TEXT = "The cat of Ann is red. How many cats has Bob? Bob has two cats and a dog, which is 3 animals.\n\n"
NAMES = ["Ann", "Bob", "the dog", "a red cat of Bob's"]
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {train: FOLDER/rows.json, test: FOLDER/rows.json}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 2
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]
"""
SPACED = CHOICE.replace("task: choice", "task: spaced").replace('Answer:"', 'Answer:  "\ntarget_delimiter: ""')
GENERATE = """
task: generate
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 37, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
TASKS = {"choice": CHOICE, "spaced": SPACED, "generate": GENERATE, "rolling": ROLLING}
LLAMA = models.llama(2, 32, 4, 2, 48, vocab_size=290, max_length=128)
CONFIGS = {  # whose tokenizers put a BOS in front of a text or have none
    "gpt": models.gpt(2, 32, 2, vocab_size=290, max_length=128),
    "llama": dataclasses.replace(LLAMA, tie_embeddings=True),
    "qwen": dataclasses.replace(LLAMA, bias="qkv"),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of the tasks, beside their rows."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    words = TEXT.split()
    say = lambda n: " ".join(rng.choice(words, n))
    rows = [
        {"question": f"{say(rng.integers(2, 6))}?", "choices": rng.permutation(NAMES).tolist(), "answer": n % 4}
        | {"long": say(60 if n == 0 else 3)}
        for n in range(9)
    ]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return [str(folder / f"{name}.yaml") for name in TASKS]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of each shape."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    tokenizer = tokenizers.train([TEXT * 3], 290, folder / "tokenizer")
    for name, config in CONFIGS.items():
        if name == "llama":
            backend = tokenizer.backend_tokenizer
            bos = (tokenizers.EOS, tokenizer.eos_token_id)
            backend.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
            tokenizer.bos_token = tokenizers.EOS
        elif name == "qwen":
            tokenizer = tokenizers.load(folder / "tokenizer")
        apply = models.bind(models.Transformer(config))
        params = jax.tree.map(lambda x: 3 * x, tiny.policy(config))  # far from uniform
        made[name] = folder / name
        models.save(models.Model(config, params, tokenizer, apply), params, made[name])
    return made


def load(path: Path, layout: parallel.Layout = ONE, batch: int = 8) -> harness.Harness:
    return harness.Harness(path, models.load(path, place=layout.sharding), layout, batch)


def answers(found: dict, name: str) -> list[Any]:
    """The answers to the requests of a task, in the order of its questions."""
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [one for sample in samples for response in sample["filtered_resps"] for one in [response]]


def asked(*args: Any) -> list[Any]:
    return [types.SimpleNamespace(args=one) for one in args]


@HAS_HARNESS
@HAS_TORCH
@THEIRS
@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, "HARNESS_MODEL"])
def test_parity_with_the_harness_own_backend(name, directories, tasks):
    import torch
    from lm_eval.models.huggingface import HFLM

    if name == "HARNESS_MODEL":
        if name not in os.environ:
            pytest.skip("needs HARNESS_MODEL, a model directory")
        tasks = os.environ["HARNESS_TASKS"].split(",") if "HARNESS_TASKS" in os.environ else tasks
    path = directories.get(name) or Path(os.environ[name])
    theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=4)
    limit = int(os.environ.get("HARNESS_LIMIT", "9"))
    with torch.no_grad():
        expected = harness.evaluate(theirs, tasks, limit=limit)
    found = harness.evaluate(load(path), tasks, limit=limit)
    for task in expected["samples"]:
        ours, others = answers(found, task), answers(expected, task)
        assert len(ours) == len(others) > 0
        if isinstance(others[0], str):
            assert ours == others
            assert len(set(ours)) > 3
            print(f"\n{name}, {task}: the same {len(ours)} answers", end="")
        else:
            logp, logp_ = np.array(ours, float), np.array(others, float)  # and, beside options, whether it is greedy
            print(f"\n{name}, {task}: {len(ours)} log-likelihoods within {np.abs(logp - logp_).max():.1e}", end="")
            # Of a whole text: PyTorch's log_softmax in float32 is off by up to 1e-5 nats a token, always to one side.
            np.testing.assert_allclose(logp, logp_, rtol=1e-5 if logp.ndim == 1 else 0, atol=1e-3)
        for metric, value in expected["results"][task].items():
            if "stderr" not in metric and isinstance(value, float):
                print(f", {metric.partition(',')[0]} {value:.4g}", end="")
                np.testing.assert_allclose(found["results"][task][metric], value, rtol=1e-5, err_msg=f"{task} {metric}")


@HAS_HARNESS
@THEIRS
@pytest.mark.slow
def test_every_layout_answers_alike(directories, tasks):
    mesh = parallel.layout(parallel.Config(data=2, fsdp=2, tensor=2))
    one, mesh, mapped = (
        harness.evaluate(load(directories["llama"], layout), tasks[::2], limit=3)
        for layout in (ONE, mesh, parallel.PMAP)
    )
    for task in ("choice", "generate"):
        if task == "generate":
            assert answers(one, task) == answers(mesh, task) == answers(mapped, task)
        else:
            np.testing.assert_allclose(answers(one, task), answers(mesh, task), atol=1e-4)
            np.testing.assert_allclose(answers(one, task), answers(mapped, task), atol=1e-4)


@HAS_HARNESS
@THEIRS
def test_answers_end_at_the_first_string_that_ends_them(directories):
    """However it is spelled, and in whichever part of the answer it begins; what is sampled depends on no other."""
    lm = load(directories["gpt"])
    (free,) = lm.generate_until(asked(("The cat", {"max_gen_toks": 60})))
    whole = [part.group() for part in re.finditer("[^\ufffd]{1,4}", free)]  # characters that are whole
    cuts = [whole[len(whole) // 2], whole[1], whole[-1], free[:2], "never"]
    settings = [{"until": [cut], "max_gen_toks": 60} for cut in cuts]
    found = lm.generate_until(asked(*(("The cat", one) for one in settings), ("Bob", settings[0])))
    assert found[:5] == [free.partition(cut)[0] for cut in cuts]
    both = lm.generate_until(asked(("The cat", {"until": cuts[1:3], "max_gen_toks": 60})))
    assert both == [free.partition(cuts[1])[0].partition(cuts[2])[0]]


@HAS_HARNESS
@THEIRS
def test_long_contexts_lose_their_oldest_tokens(directories, capsys):
    lm = load(directories["gpt"])
    settings = {"until": [], "max_gen_toks": 8}
    long, short = lm.generate_until(asked((TEXT * 9, settings), ("Bob", settings)))
    assert "warning: 1 of 2 contexts leave no room for 8 tokens and lose their oldest" in capsys.readouterr().err
    kept = lm.tokenizer.decode(lm.tok_encode(TEXT * 9)[-120:])
    assert lm.generate_until(asked((kept, settings), ("Bob", settings))) == [long, short]


@HAS_HARNESS
@THEIRS
def test_tokens_are_drawn_where_a_task_asks_for_it(directories):
    """Differently with another seed, and alike with the same."""
    drawn = {"until": [], "max_gen_toks": 24, "do_sample": True, "temperature": 2.0, "top_k": 50}
    path = directories["gpt"]
    model = models.load(path)
    one, again, other = (
        harness.Harness(path, model, parallel.PMAP, 8, seed).generate_until(asked(("Bob", drawn), ("Ann", drawn)))
        for seed in (1, 1, 2)
    )
    assert one == again and one != other and len({*one, *other}) == 4


@HAS_HARNESS
@THEIRS
def test_a_penalty_of_the_model_is_left_out_and_said(directories, capsys):
    path = directories["gpt"]
    model = dataclasses.replace(models.load(path), generation={"repetition_penalty": 1.1})
    harness.Harness(path, model, ONE, 8)
    assert "warning: repetition_penalty=1.1 of generation_config.json is left out" in capsys.readouterr().err


@HAS_HARNESS
@THEIRS
def test_what_cannot_be_asked_is_refused(directories, tasks):
    lm = load(directories["gpt"])
    with pytest.raises(InputError, match="max_gen_toks=128 leaves no room in the model's 128 tokens: lower it"):
        lm.generate_until(asked(("The cat", {"until": [], "max_gen_toks": 128})))
    with pytest.raises(InputError, match="generation_kwargs of a task has num_beams: expected until"):
        lm.generate_until(asked(("The cat", {"until": [], "max_gen_toks": 8, "num_beams": 2})))
    with pytest.raises(InputError, match="--tasks nothing: no such task comes with lm-evaluation-harness"):
        harness.evaluate(lm, ["nothing"])


@HAS_HARNESS
@THEIRS
def test_the_experiment_writes_the_results(directories, tasks, tmp_path, capsys):
    cfg = experiment.Config(
        model=directories["qwen"], tasks=(tasks[0],), shots=1, limit=3, out=tmp_path / "run", batch=8
    )
    assert 0 <= experiment.main(cfg)["choice"]["acc,none"] <= 1
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["settings"]["shots"] == 1 and written["n-shot"] == {"choice": 1}
    assert "acc_norm" in capsys.readouterr().out


def test_the_experiment_needs_tasks_that_there_are(tmp_path):
    with pytest.raises(InputError, match="--tasks is missing"):
        experiment.main(experiment.Config())
    with pytest.raises(InputError, match=r"mine\.yaml: no such file or folder of tasks"):
        experiment.main(experiment.Config(tasks=(str(tmp_path / "mine.yaml"),)))


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(harness, "MISSING", "No module named 'lm_eval'")
    with pytest.raises(
        InputError, match=r"needs the extra eval: pip install -e .\[eval\] \(No module named 'lm_eval'\)"
    ):
        harness.Harness(Path("x"), models.Model(tiny.GPT, {}, None, print), parallel.PMAP, 1)
