"""Reading comprehension, and the kind of it that takes common sense: what does a passage say?"""

import re

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.flan.readers import asked, chosen, example, labelled, written
from rlhf_jax.data.tasks.task import Example, Task, Template

CLUSTER = "reading"
WITH_COMMONSENSE = "reading_commonsense"
UNANSWERABLE = "no answer"
_NO_YES = ("no", "yes")


def _boolq(row: Row) -> Example | None:
    question = row["question"].strip().rstrip("?")  # as people typed it into a search engine
    return example({"passage": row["passage"], "question": f"{question}?"}, [_NO_YES[row["answer"]]], _NO_YES)


def _openbookqa(row: Row) -> Example | None:
    question = row["question"]
    options = [question[f"choice_{letter}"] for letter in "ABCD"]
    return example({"fact": row["fact1"], "question": question["stem"]}, chosen(options, row["answerKey"]), options)


def _squad(row: Row) -> Example | None:
    answers = [answer["text"] for answer in row["answers"]] or [UNANSWERABLE]
    return example({"passage": row["context"], "question": row["question"]}, answers)


def _cosmos_qa(row: Row) -> Example | None:
    options = [row[f"answer{number}"] for number in range(4)]
    fields = {"passage": row["context"], "question": row["question"]}
    return example(fields, chosen(options, row["label"]), options)


def _record(row: Row) -> Example | None:
    # The article's main points follow it, each behind this mark.
    passage = re.sub(r"\s*@highlight\s*", "\n- ", row["passage"])
    return example({"passage": passage, "query": row["query"].replace("@placeholder", "___")}, row["answers"],
                   row["entities"])  # fmt: skip


_SQUAD_ASKED = asked(
    "{passage}\n\nQuestion: {question}\nAnswer:",
    "Read this and answer the question.\n\n{passage}\n\n{question}",
    "{question}\n\nThe following article has the answer. Copy it word by word.\n\n{passage}\n\nAnswer:",
    "Article: {passage}\n\nNow tell me this, as briefly as you can: {question}",
    "From the text below, extract the phrase that answers: {question}\n\nText: {passage}\n\nPhrase:",
    "{passage}\n\nWhat would you reply, having read that, to somebody who asks: {question}",
    "A pupil looks up the answer to a question in an encyclopedia.\n\nQuestion: {question}\nEncyclopedia: {passage}\n"
    "What the pupil notes down:",
)

TASKS = (
    Task(
        name="boolq",
        cluster=CLUSTER,
        data="bool_q",
        reader=_boolq,
        templates=(
            *asked(
                "{passage}\n\n{question}{options}\n\nAnswer:",
                "Text: {passage}\n\nQuestion: {question}{options}\n\nAnswer:",
                "Answer with yes or no, going by the passage: {question}\n\n{passage}{options}\n\nAnswer:",
                'Somebody wonders: "{question}" They find this article.\n\n{passage}\n\nWhat does it tell'
                " them?{options}"
                "\n\nIt tells them:",
                "Judging by what is written below, {question}\n\n{passage}{options}\n\nJudgement:",
                "Read: {passage}\n\nNow say whether it is so. {question}{options}\n\nYou say:",
                "{question}\n\nHere is all you need to know.\n\n{passage}{options}\n\nSo the answer is",
                "You have a passage and a question that is settled by it.\n\nQ: {question}\nPassage:"
                " {passage}{options}\n\nA:",
            ),
            Template(
                '{passage}\n\nAsk a question about the text to which the answer is "{answer}".', target="{question}"
            ),
            Template(
                'Write a paragraph from which one learns that the answer to "{question}" is {answer}.',
                target="{passage}",
            ),
        ),
    ),
    Task(
        name="drop",
        cluster=CLUSTER,
        data="drop",
        reader=written({"passage": "passage", "question": "question"}, "answer", others="validated_answers"),
        metric="f1",
        held_out="dev",
        templates=(
            *asked(
                "{passage}\n\nQuestion: {question}\nAnswer:",
                "Work out the answer from the passage. You may have to count, add or compare.\n\nPassage: {passage}\n\n"
                "{question}",
                "{question}\n\nFind out from this text.\n\n{passage}\n\nResult:",
                "Report: {passage}\n\nGiven the report: {question}",
                "Read the account below. Then answer this: {question}\n\n{passage}\n\nAnswer:",
                "{passage}\n\nWith the facts above, what is the answer to the following? {question}",
                "The question is: {question} What is needed to answer it stands here: {passage}\n\nThe answer:",
                "Use the numbers, names and dates of this passage to answer.\n\n{passage}\n\nQ: {question}\nA:",
            ),
            Template(
                "{passage}\n\nAsk something about this passage that is answered by: {answer}", target="{question}"
            ),
            Template("Passage: {passage}\nAnswer to be worked out from it: {answer}\nQuestion:", target="{question}"),
        ),
    ),
    Task(
        name="multirc",
        cluster=CLUSTER,
        data="super_glue/multirc",
        reader=labelled({"passage": "paragraph", "question": "question", "candidate": "answer"}, _NO_YES),
        templates=(
            *asked(
                "{passage}\n\nQuestion: {question}\nProposed answer: {candidate}\n\nIs the proposed answer"
                " correct?{options}"
                "\n\nVerdict:",
                '{passage}\n\nA pupil is asked "{question}" and replies "{candidate}". Is that right?{options}'
                "\n\nAnswer:",
                "Grade a test on a text.\n\nText: {passage}\n\nQuestion: {question}\nReply: {candidate}{options}"
                "\n\nRight?",
                '{question}\n\nIs "{candidate}" a correct answer, if one believes the text below?\n\n{passage}{options}'
                "\n\nAnswer:",
                "Story: {passage}\n\nThere may be several good answers to this question: {question}\nIs this one of"
                " them?"
                " {candidate}{options}\n\nAnswer:",
                "Read the passage and say if the answer holds.\n\nPassage: {passage}\nQ: {question}\nA:"
                " {candidate}{options}"
                "\n\nDoes it hold?",
                '"{candidate}"\n\nWould you accept this as an answer to "{question}"? Look here:\n\n{passage}{options}'
                "\n\nAnswer:",
                "Question: {question}\nSuggestion: {candidate}\n\nKeep the suggestion if the text bears it out, or"
                " reject it. Text: {passage}{options}\n\nKeep it?",
            ),
            Template(
                "{passage}\n\nQuestion: {question}\nWrite an answer. Is it correct? It should be: {answer}.\n\nAnswer:",
                target="{candidate}",
            ),
            Template(
                '{passage}\n\nA pupil was asked a question on this text and replied "{candidate}". Was that right? The'
                " teacher's verdict: {answer}.\n\nQuestion:",
                target="{question}",
            ),
        ),
    ),
    Task(
        name="openbookqa",
        cluster=CLUSTER,
        data="openbookqa",
        reader=_openbookqa,
        held_out="test",
        templates=(
            *asked(
                "{fact}\n\n{question}{options}\n\nAnswer:",
                "Fact: {fact}\n\nWith this in mind, complete or answer: {question}{options}\n\nAnswer:",
                "You are told that {fact}.\n\nQuestion: {question}{options}\n\nBest choice:",
                "Knowing that {fact}, which of these is right?\n\n{question}{options}\n\nRight is:",
                "An exam with an open book. The book says: {fact}. The exam says: {question}{options}\n\nAnswer:",
                "{question}{options}\n\nHint: {fact}.\n\nAnswer:",
                "Combine the fact with what everybody knows.\n\nFact: {fact}\nTask: {question}{options}\n\nSolution:",
                "Somebody who knows that {fact} is asked the following. {question}{options}\n\nThey should choose:",
            ),
            Template(
                'Fact: {fact}\n\nWrite an exam question on this fact whose right answer is "{answer}".',
                target="{question}",
            ),
            Template(
                'Which fact of science helps one to see that the answer to "{question}" is "{answer}"?', target="{fact}"
            ),
        ),
    ),
    Task(
        name="squad-v1",
        cluster=CLUSTER,
        data="squad/v1.1",
        reader=_squad,
        metric="f1",
        templates=(
            *_SQUAD_ASKED,
            Template(
                "{passage}\n\nHere is the answer to a question about this text: {answer}\n\nQuestion:",
                target="{question}",
            ),
            Template(
                'Write a paragraph in which one finds that the answer to "{question}" is "{answer}".',
                target="{passage}",
            ),
            Template("Text: {passage}\nAnswer: {answer}\nQuestion:", target="{question}"),
        ),
    ),
    Task(
        name="squad-v2",
        cluster=CLUSTER,
        data="squad/v2.0",
        reader=_squad,
        metric="f1",
        templates=(
            *asked(
                "{passage}\n\nQuestion: {question}\nIf the text does not tell, write: no answer.\nAnswer:",
                'Answer the question with words of the article, or with "no answer" if it is not in there.\n\n'
                "Article: {passage}\n\n{question}",
                '{question}\n\nLook it up below. Reply "no answer" if you cannot find it.\n\n{passage}\n\nReply:',
                "Some of these questions cannot be answered from the passage; the reply to those is: no answer.\n\n"
                "Passage: {passage}\nQuestion: {question}\nReply:",
                'Text: {passage}\n\nDoes the text say this: {question} If so, quote it; else say "no answer".',
                "You may say nothing that is not in these lines.\n\n{passage}\n\n{question} (If you have to pass, say:"
                " no"
                " answer.)",
                "Find the phrase that answers the question, or state that there is no answer."
                "\n\nQ: {question}\nContext:"
                " {passage}\nA:",
                "Reading test. Where the text gives no answer, the key says: no answer.\n\nText: {passage}\nQuestion:"
                " {question}\nKey:",
            ),
            Template(
                '{passage}\n\nAsk a question to which one must reply, from this text alone: "{answer}".',
                target="{question}",
            ),
            Template(
                'A reader of the text below is asked something. The right reply is "{answer}".\n\n{passage}\n\nWhat was'
                " asked?",
                target="{question}",
            ),
        ),
    ),
    Task(
        name="cosmos_qa",
        cluster=WITH_COMMONSENSE,
        data="cosmos_qa",
        reader=_cosmos_qa,
        templates=(
            *asked(
                "{passage}\n\n{question}{options}\n\nAnswer:",
                "From somebody's diary: {passage}\n\nReading between the lines: {question}{options}\n\nAnswer:",
                "{question}\n\nThe text does not say it outright, but one can tell.\n\n{passage}{options}"
                "\n\nOne can tell"
                " that:",
                "Story: {passage}\nQuestion: {question}\n\nPick the most plausible answer.{options}\n\nPick:",
                "What do you make of this?\n\n{passage}\n\n{question}{options}\n\nMost likely:",
                "Use common sense to answer a question on what happened to somebody.\n\nWhat happened: {passage}\n\n"
                "Question: {question}{options}\n\nAnswer:",
                "Context: {passage}\n\nWhich of the options answers the question?{options}\n\nQuestion:"
                " {question}\nAnswer:",
                "Put yourself in the place of the one who wrote this.\n\n{passage}\n\n{question}{options}\n\nProbably:",
            ),
            Template(
                "{passage}\n\nAsk a question that needs some thought, and which this answers: {answer}",
                target="{question}",
            ),
            Template(
                'Tell something that happened, so that a reader will answer "{question}" with "{answer}".',
                target="{passage}",
            ),
        ),
    ),
    Task(
        name="record",
        cluster=WITH_COMMONSENSE,
        data="super_glue/record",
        reader=_record,
        templates=(
            *asked(
                "{passage}\n\nFill the gap in this sentence about the news: {query}{options}\n\nThe gap:",
                "News: {passage}\n\nSentence: {query}\n\nWho or what is missing?{options}\n\nMissing:",
                "{query}\n\nWhich of the names in the article belongs at the place of ___?\n\nArticle:"
                " {passage}{options}"
                "\n\nName:",
                "Read the article, then complete the sentence below it.\n\n{passage}\n\n{query}{options}\n\n___ is:",
                "An editor has lost a name in this sentence: {query}\nThe rest of the story: {passage}{options}"
                "\n\nThe name:",
                "{passage}\n\nAccording to this report, what should stand for ___?\n\n{query}{options}\n\nAnswer:",
                "Choose what makes the sentence true.{options}\n\nReport: {passage}\n\nSentence: {query}\n\nChoice:",
                "{query}\n\nThe gap is one of those who or which are named in the following news."
                "\n\n{passage}{options}\n\nFill in:",
            ),
            Template(
                "{passage}\n\nWrite another sentence about this news that mentions {answer}, with ___ in place of it.",
                target="{query}",
            ),
            Template(
                "Write a news story after which it is clear that ___ stands for {answer} in this sentence: {query}",
                target="{passage}",
            ),
        ),
    ),
)
