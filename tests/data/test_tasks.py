"""Tasks: what their rows hold, and how templates put them into words."""

import json

import pytest

from rlhf_jax.data.rows import check
from rlhf_jax.data.tasks import Example, Task, Template, in_words, shots, with_reasoning
from rlhf_jax.types import InputError

ROW = {"question": "Is ice cold?", "options": ["yes", "no"], "answer": "yes", "rationale": "Ice is frozen water."}
ICE = Example({"question": "Is ice cold?"}, ("yes",), ("yes", "no"), "Ice is frozen water.")
ASK = Template("{question}{options}")


def test_in_words():
    assert in_words(ICE, ASK) == ("Is ice cold?\n\nOPTIONS:\n- yes\n- no", "yes")
    turned = Template("Ask something to which one says {answer}.", target="{question}")
    assert in_words(ICE, turned) == ("Ask something to which one says yes.", "Is ice cold?")
    assert turned.turned and not ASK.turned and turned.names == {"question"}
    assert in_words(Example({"question": "Why {answer}?"}, ("So.",)), ASK)[0] == "Why {answer}?"  # verbatim
    with pytest.raises(InputError, match=r"rte, template 2: no field \{premise\}; there are answer, options, question"):
        in_words(ICE, Template("{premise}"), "rte, template 2")


def test_with_reasoning():
    prompt, target = with_reasoning(ICE, ASK, "Think.")
    assert prompt.endswith("- no\nThink.") and target == "Ice is frozen water. So the answer is yes."
    with pytest.raises(InputError, match="no rationale"):
        with_reasoning(Example({"question": "?"}, ("a",)), ASK, "Think.")


def test_rows_of_a_file(tmp_path):
    file = tmp_path / "ice.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROW, {"question": "Two?", "answer": ["2", "two"]})))
    task = Task("ice", "facts", str(file), (ASK,), held_out="train")
    rows = task.rows("train", data_dir=tmp_path / "data")
    assert [task.read(row) for row in rows] == [ICE, Example({"question": "Two?"}, ("2", "two"))]
    lengths = Task("ice", "facts", str(file), (ASK,), reader=lambda row: Example({}, (str(len(row["question"])),)))
    assert [lengths.read(row).answer for row in lengths.rows("train", data_dir=tmp_path / "data")] == ["12", "4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "maybe"}, "field answer: expected one of the options, got 'maybe'"),
        ({"answer": 2}, "field answer: expected a text, a list of texts, or the number of an option, 0 to 1; got 2"),
        ({"answer": 2, "options": []}, "field answer: expected a text, a list of texts; got 2"),
        ({"options": ["yes", "yes"]}, "field options: expected different ones"),
        ({"options": "yes"}, "field options: expected a list of texts"),
        ({"answer": []}, "expected a question, an answer"),
        ({"question": " "}, "expected a question"),
        ({"rationale": 1}, "field rationale: expected"),
    ],
)
def test_bad_examples(change, message):
    with pytest.raises(InputError, match=message):
        check("examples", ROW | change, "line 1")
    assert check("examples", ROW | {"answer": 1}, "line 1")["answers"] == ["no"]


def test_shots():
    pairs = [("1 + 1 =", "2"), ("2 + 2 =", "4")]
    assert shots.text(pairs, "3 + 3 =") == "1 + 1 = 2\n\n2 + 2 = 4\n\n3 + 3 ="
    listed = [("One?\n\nOPTIONS:\n- a\n- b", "b"), ("Two?\nOptions:\n(A) c\n(B) d", "(B)")]
    assert shots.text(listed, "- 3 =") == f"{listed[0][0]}\nb\n\n{listed[1][0]}\n(B)\n\n- 3 ="
    assert [(m["role"], m["content"]) for m in shots.messages(pairs[:1], "3 + 3 =")] == [
        ("user", "1 + 1 ="),
        ("assistant", "2"),
        ("user", "3 + 3 ="),
    ]
    assert sorted(shots.order(9, 1)) == list(range(9))
    assert list(shots.order(9, 1)) == list(shots.order(9, 1)) != list(shots.order(9, 2))
