"""Prompts: examples in front of a question, what fits the context, and what is refused."""

import dataclasses
import json

import pytest

from rlhf_jax.data.tasks import Example, Task, Template
from rlhf_jax.evaluation import prompts
from rlhf_jax.evaluation.prompts import Form, Room
from rlhf_jax.types import InputError
from tests.evaluation.models import model

TOKENIZER = model().tokenizer
ROOM = Room(context=128, answer=4)


def task(tmp_path, rows, **others):
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Task(
        "sums", "maths", str(file), **{"templates": (Template("{question}{options}"),), "train": "train"} | others
    )


ROWS = [{"question": f"{n}+{n}?", "answer": str(2 * n), "rationale": f"Twice {n}."} for n in range(8)]


def write(tmp_path, form, rows=ROWS, room=ROOM, asked=2, by="write", **others):
    """The first rows as questions, with the others, and themselves, as a pool of examples."""
    one = task(tmp_path, rows, **others)
    pool = one.rows("train", data_dir=tmp_path / "data")
    questions = list(prompts.held_out(one, pool, asked))
    return prompts.write(one, questions, TOKENIZER, form, room, pool if form.shots else None, by)


def text(question):
    return prompts.shown(TOKENIZER, question)


def test_without_examples(tmp_path):
    asked, left_out = write(tmp_path, Form(chat=False))
    assert [text(question) for question in asked] == ["0+0?", "1+1?"] and not left_out
    assert [question.row for question in asked] == [0, 1]
    asked, _ = write(tmp_path, Form())
    assert text(asked[1]) == "Question: 1+1?\nAnswer:"


def test_examples_are_the_same_for_all_and_never_the_question(tmp_path):
    asked, left_out = write(tmp_path, Form(shots=7, chat=False), asked=8)
    for n, question in enumerate(asked):
        examples = text(question).split("\n\n")[:-1]
        assert len(examples) == question.shots == 7
        assert sorted(examples) == sorted(f"{m}+{m}? {2 * m}" for m in range(8) if m != n)
    again, _ = write(tmp_path, Form(shots=7, chat=False), asked=8)
    assert [text(one) for one in again] == [text(one) for one in asked] and not left_out
    two, _ = write(tmp_path, Form(shots=2, chat=False), asked=8)
    starts = {text(question).rpartition("\n\n")[0] for question in two}
    assert len(starts) <= 3  # all alike but where the question is itself one of the two
    other, _ = write(tmp_path, Form(shots=2, chat=False, seed=1), asked=8)
    assert starts != {text(question).rpartition("\n\n")[0] for question in other}


def test_each_question_may_draw_its_own(tmp_path):
    asked, _ = write(tmp_path, Form(shots=2, chat=False, same_shots=False), asked=8)
    assert len({text(question).rpartition("\n\n")[0] for question in asked}) > 4


def test_messages_and_a_chain_of_thought(tmp_path):
    asked, _ = write(tmp_path, Form(shots=1, reasoning=True), hint="Think.", shots="train", preface="Add.")
    shot = "Question: Add.\n\n0+0?\nThink.\nAnswer: Twice 0. So the answer is 0.<|endoftext|>"
    assert text(asked[1]) == f"{shot}Question: 1+1?\nThink.\nAnswer:"
    asked, _ = write(tmp_path, Form(shots=1, reasoning=True, chat=False), hint="Think.", shots="train", preface="Add.")
    assert text(asked[1]) == "Add.\n\n0+0?\nThink. Twice 0. So the answer is 0.\n\n1+1?\nThink."


def test_fixed_examples_keep_their_order(tmp_path):
    asked, _ = write(tmp_path, Form(shots=3, chat=False), shots="train")
    assert text(asked[0]).startswith("1+1? 2\n\n2+2? 4\n\n3+3? 6\n\n0+0?")


def test_examples_without_a_rationale_are_no_chain_of_thought(tmp_path):
    rows = [*ROWS[:2], {"question": "9+9?", "answer": "18"}, ROWS[3]]
    asked, left_out = write(tmp_path, Form(shots=3, reasoning=True, chat=False), rows, Room(context=400, answer=4))
    assert [question.shots for question in asked] == [2, 2] and "9+9" not in text(asked[0])
    assert left_out == {"examples missing in every prompt: there are no more with a rationale": 1}


def test_as_many_examples_as_fit(tmp_path):
    long = [{"question": "1+1, " * 8 + "?", "answer": "2"}, *ROWS]
    asked, left_out = write(tmp_path, Form(shots=6, chat=False), long, Room(context=60, answer=4), asked=3)
    assert all(len(question.ids) + 4 <= 60 for question in asked)
    assert asked[0].shots < asked[1].shots
    fewer = sum(question.shots < 6 for question in asked)
    assert left_out["questions with fewer than 6 examples, as many as fit the context"] == fewer > 0


def test_questions_that_do_not_fit(tmp_path):
    long = [{"question": "1+1, " * 40 + "?", "answer": "2"}, *ROWS]
    asked, left_out = write(tmp_path, Form(chat=False), long, Room(context=60, answer=4), asked=3)
    assert [question.row for question in asked] == [1, 2]
    assert left_out == {"questions refused, of more than 60 tokens with the answer": 1}
    with pytest.raises(InputError, match="task sums: none of 1 questions fits into 60 tokens with 4 for the answer: "):
        write(tmp_path, Form(chat=False), long, Room(context=60, answer=4), asked=1)
    with pytest.raises(InputError, match="fits into 60 tokens: raise --length"):
        write(tmp_path, Form(chat=False), long, Room(context=60, answer=0), asked=1, by="read")


def test_another_question_takes_the_place_of_one_that_does_not_fit(tmp_path):
    long = {"question": "1+1, " * 40 + "?", "answer": "2"}
    one = task(tmp_path, [long, *ROWS[:3], long, *ROWS[3:]])
    pool = one.rows("train", data_dir=tmp_path / "data")
    every = list(prompts.held_out(one, pool, None))
    room = Room(context=60, answer=4)
    asked, left_out = prompts.write(one, every[:2], TOKENIZER, Form(chat=False), room, None, "write", every[4:])
    assert [question.row for question in asked] == [1, 5]
    assert left_out == {"questions refused, of more than 60 tokens with the answer": 2}


def test_each_question_takes_the_next_template(tmp_path):
    """A question takes the next template that asks for the answer; its examples are in the same one."""
    three = tuple(Template(text) for text in ("{question}", "Which is {answer}?", "Add {question}"))
    templates = (three[0], dataclasses.replace(three[1], target="{question}"), three[2])
    asked, _ = write(tmp_path, Form(shots=1, chat=False, template=None), asked=4, templates=templates)
    prompts_of = [text(question).split("\n\n") for question in asked]
    assert [prompt[1] for prompt in prompts_of] == ["0+0?", "Add 1+1?", "2+2?", "Add 3+3?"]
    assert [prompt[0].startswith("Add ") for prompt in prompts_of] == [False, True, False, True]


def test_options_follow_the_prompt(tmp_path):
    rows = [{"question": "Is it?", "options": ["yes", "no"], "answer": "no"}]
    asked, _ = write(tmp_path, Form(chat=False), rows, asked=1, by="rank")
    assert [TOKENIZER.decode(ids) for ids in asked[0].options] == ["\nyes", "\nno"]  # below the list of them
    plain = (Template("{question}"),)
    asked, _ = write(tmp_path, Form(chat=False), rows, asked=1, by="rank", templates=plain)
    assert [TOKENIZER.decode(ids) for ids in asked[0].options] == [" yes", " no"]
    asked, _ = write(tmp_path, Form(), rows, asked=1, by="rank")
    assert [TOKENIZER.decode(ids) for ids in asked[0].options] == [" yes", " no"]  # as the template has it
    asked, _ = write(tmp_path, Form(), rows, asked=1, by="read")
    assert [TOKENIZER.decode(ids) for ids in asked[0].options] == [" yes<|endoftext|>", " no<|endoftext|>"]
    asked, _ = write(tmp_path, Form(), asked=1, by="read")
    assert [TOKENIZER.decode(ids) for ids in asked[0].options] == [" 0<|endoftext|>"]  # the right answer


def test_the_empty_prompt():
    assert TOKENIZER.decode(prompts.empty(TOKENIZER, chat=True)) == "Question: \nAnswer:"
    assert prompts.empty(TOKENIZER, chat=False).tolist() == [TOKENIZER.eos_token_id]  # something to begin with
    assert not prompts.has_template(TOKENIZER)


def test_options_that_are_the_same_tokens(tmp_path):
    rows = [{"question": "Is it?", "options": ["yes", "yes ", "no"], "answer": "no"}]
    one = task(tmp_path, rows)
    pool = one.rows("train", data_dir=tmp_path / "data")
    asked, _ = write(tmp_path, Form(), rows, asked=1, by="rank")
    prompts.check_options(one, pool, asked)
    first, _, last = asked[0].options
    alike = [dataclasses.replace(asked[0], options=(first, first, last))]
    with pytest.raises(InputError, match=r"task sums: .*sums.jsonl, line 1: the options 'yes' and 'yes ' are the same"):
        prompts.check_options(one, pool, alike)


def test_bad_tasks(tmp_path):
    with pytest.raises(InputError, match=r"task sums, template 0: no field \{premise\}; there are answer, options, q"):
        write(tmp_path, Form(), templates=(Template("{premise}?"),))
    with pytest.raises(InputError, match="task sums has templates 0 to 0, and no template 3"):
        write(tmp_path, Form(template=3))
    turned = Template("Which sum is {answer}?", target="{question}")
    with pytest.raises(InputError, match="task sums: template 0 asks for something other than the answer"):
        write(tmp_path, Form(), templates=(turned,))
    with pytest.raises(InputError, match="task sums: no template asks for the answer"):
        write(tmp_path, Form(template=None), templates=(turned,))
    with pytest.raises(InputError, match=r"task sums: .*line 1: an answer or option is empty"):
        write(tmp_path, Form(), reader=lambda row: Example({"question": row["question"]}, ("",)))
