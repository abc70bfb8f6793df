"""The experiment: files of questions in, results, prompts, answers and a plot out."""

import json

import pytest

from experiments import evaluate_tasks
from rlhf_jax import models
from rlhf_jax.evaluation import prompts
from rlhf_jax.runs import cli
from rlhf_jax.types import InputError
from tests.evaluation.models import model


@pytest.mark.slow
def test_a_file_of_questions(tmp_path, capsys):
    rows = [{"question": f"Is {n} even?", "options": ["yes", "no"], "answer": n % 2} for n in range(10)]
    (tmp_path / "even.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("Ice is cold.\n\nSo is it.")
    models.save(model(), model().params, tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--task", tmp_path / "even.jsonl", "--shots", "0", "3", "--batch", "8",
             "--text", tmp_path / "text.txt", "--out", tmp_path / "run", "--data-dir", tmp_path / "data"]  # fmt: skip
    cli.run(evaluate_tasks.main, evaluate_tasks.Config(), list(map(str, flags)))
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [(one["task"], one["shots"], one["questions"]) for one in written["results"]] == [
        ("even", 0, 2),
        ("even", 3, 2),
    ]
    assert set(written["results"][0]["scores"]) == {"acc", "acc_norm", "acc_calibrated"}
    assert written["results"][0]["scores"]["acc"].keys() == {"value", "error", "low", "high"}
    assert written["text"]["bytes"] == 21 and written["text"]["perplexity"] > 1
    shown = (tmp_path / "run" / "prompts.txt").read_text()
    assert "==== even, 3 shots, prompt 2 ====" in shown and shown.count("Is 1 even?\n\nOPTIONS:\n- yes\n- no") == 2
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and answers[0].keys() == {"task", "row", "shots", "said", "right", "score"}
    assert (tmp_path / "run" / "shots.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| even | 3 | 2 | acc 0." in printed or "| even | 3 | 2 | acc 1." in printed
    assert "bits a byte, perplexity" in printed


def test_nothing_to_evaluate():
    with pytest.raises(InputError, match="nothing to evaluate: name tasks or files of questions by --task, or doc"):
        evaluate_tasks.main(evaluate_tasks.Config())


def test_a_template_of_the_models_own():
    tokenizer = model().tokenizer
    assert not prompts.has_template(tokenizer)  # that of this project, which is put where there is none
