"""Closed-book question answering: what does one know without looking it up?"""

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.flan.readers import asked, example
from rlhf_jax.data.tasks.task import Example, Task, Template

CLUSTER = "closed_book"


def _arc(row: Row) -> Example | None:
    options = [choice["text"] for choice in row["choices"]]
    right = [choice["text"] for choice in row["choices"] if choice["label"] == row["answerKey"]]
    return example({"question": row["question"]}, right, options)


def _natural_questions(row: Row) -> Example | None:
    question = row["question"].strip()  # as people typed it into a search engine, mostly without a question mark
    return example({"question": question if question.endswith("?") else f"{question}?"}, row["answer"])


def _trivia_qa(row: Row) -> Example | None:
    answer = row["answer"]
    if answer["value"] == "<unk>":  # of the test rows
        return None
    return example({"question": row["question"]}, [answer["value"], *answer["aliases"], *answer["normalized_aliases"]])


_ARC = (
    *asked(
        "{question}{options}\n\nAnswer:",
        "Here is a question from a science test.\n\n{question}{options}\n\nThe right answer:",
        "Question: {question}\n\nChoose one of the answers.{options}\n\nChoice:",
        "Which of the options below is correct?{options}\n\n{question}\n\nCorrect is:",
        "A teacher asks: {question}\nWhat should a pupil reply?{options}\n\nReply:",
        "Pick the best answer to this question of natural science.\n\n{question}{options}\n\nBest answer:",
        "Use what you know about nature to answer.\n\nQ: {question}{options}\n\nA:",
    ),
    Template('Write a question for a science test to which the right answer is "{answer}".', target="{question}"),
    Template("Right answer: {answer}\nQuestion of the exam in science:", target="{question}"),
    Template(
        "A quiz on science has several answers to choose from, and this one is right: {answer}\n\nWhat does the quiz"
        " ask?",
        target="{question}",
    ),
)


def _arc_task(name: str, config: str) -> Task:
    return Task(
        name=name,
        cluster=CLUSTER,
        data=f"ai2_arc/{config}",
        templates=_ARC,
        reader=_arc,
        held_out="test",
    )


TASKS = (
    _arc_task("arc-easy", "ARC-Easy"),
    _arc_task("arc-challenge", "ARC-Challenge"),
    Task(
        name="natural_questions",
        cluster=CLUSTER,
        data="natural_questions_open",
        reader=_natural_questions,
        metric="exact",
        templates=(
            *asked(
                "{question}",
                "Question: {question}\nAnswer:",
                "Answer in a few words: {question}",
                "Somebody types this into a search engine: {question}\nWhat are they looking for?",
                "Tell me, {question}",
                "I need a fact, nothing but the fact. {question}",
                "Do you know this? {question}\n\nShort answer:",
            ),
            Template('What could one ask to learn of "{answer}"?', target="{question}"),
            Template("Answer: {answer}\nQuestion:", target="{question}"),
            Template(
                'A search engine replies "{answer}" to a question. What question may that be?', target="{question}"
            ),
        ),
    ),
    Task(
        name="trivia_qa",
        cluster=CLUSTER,
        data="trivia_qa/rc.nocontext",
        reader=_trivia_qa,
        metric="exact",
        templates=(
            *asked(
                "{question}",
                "Trivia question: {question}\nAnswer:",
                "It is quiz night. {question}",
                "For a point: {question}\n\nYour answer:",
                "Give the answer, without an explanation. {question}",
                "Quizmaster: {question}\nContestant:",
                "Here is one from a book of trivia. {question}\n\nThe solution:",
            ),
            Template('Make up a quiz question that is answered by "{answer}".', target="{question}"),
            Template("The contestant wins with this answer: {answer}\nWhat was the question?", target="{question}"),
            Template("Answer: {answer}\nTrivia question:", target="{question}"),
        ),
    ),
)
