"""Struct to text: put data into sentences."""

import re

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.flan.readers import asked, example
from rlhf_jax.data.tasks.task import Example, Task, Template

CLUSTER = "struct_to_text"


def _common_gen(row: Row) -> Example | None:
    return example({"words": ", ".join(row["concepts"])}, [row["target"], *row["references"]])


def _dart(row: Row) -> Example | None:
    # A triple is subject, relation, object, with spaces between. Of a table, the subject may be [TABLECONTEXT].
    facts = "\n".join(re.sub(r"\s+", " ", re.sub(r"\[\w+\]", "", triple)).strip() for triple in row["tripleset"])
    return example({"facts": facts}, [row["target"], *row["references"]])


def _e2e(row: Row) -> Example | None:
    data = re.sub(r"\[([^\]]*)\]", r": \1", row["meaning_representation"])  # name[The Eagle], food[French]
    return example({"data": data}, [row["target"], *row["references"]])


def _web_nlg(row: Row) -> Example | None:
    # Aarhus_Airport | cityServed | "Aarhus, Denmark"
    facts = "\n".join(triple.replace("_", " ").replace('"', "") for triple in row["input"])
    return example({"facts": facts}, [row["target"], *row["references"]])


TASKS = (
    Task(
        name="common_gen",
        cluster=CLUSTER,
        data="gem/common_gen",
        reader=_common_gen,
        metric="rouge",
        templates=(
            *asked(
                "Words: {words}\n\nMake a sentence with all of them.",
                "Write a sentence about an everyday scene that has these words in it: {words}.",
                "{words}\n\nUse every one of these concepts in a single sentence.",
                "How can one connect the following in a sentence that makes sense? {words}",
                "A game: you draw cards with the words {words}, and you must say one sentence with them. You say:",
                "Turn this list into a sentence.\n\nList: {words}\nSentence:",
                "Describe a situation in which all of this occurs: {words}.",
            ),
            Template("Name the most important words of this sentence. {answer}", target="{words}"),
            Template(
                "{answer}\n\nWhich nouns and verbs is this sentence made of? Give their base forms.", target="{words}"
            ),
            Template("Sentence: {answer}\nKey words:", target="{words}"),
        ),
    ),
    Task(
        name="dart",
        cluster=CLUSTER,
        data="gem/dart",
        reader=_dart,
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{facts}\n\nSay this in plain sentences.",
                "Each line holds a fact: something, a relation, and a value. Write them out as text.\n\n{facts}"
                "\n\nText:",
                "Data:\n{facts}\n\nDescription of the data:",
                "Put the rows of a table into words.\n\n{facts}\n\nIn words:",
                "Write a sentence that tells all of the following.\n\n{facts}\n\nSentence:",
                "From these triples, compose a short text.\n\n{facts}\n\nShort text:",
                "You have looked up some records:\n{facts}\nTell somebody what they say.",
            ),
            Template("{answer}\n\nList the facts of this text as subject, relation and object.", target="{facts}"),
            Template("Text: {answer}\nThe data it was written from, a line for each fact:\n", target="{facts}"),
            Template("Turn a sentence into entries for a table.\n\nSentence: {answer}\nEntries:", target="{facts}"),
        ),
    ),
    Task(
        name="e2e_nlg",
        cluster=CLUSTER,
        data="gem/e2e_nlg",
        reader=_e2e,
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{data}\n\nDescribe this restaurant.",
                "Facts about a place to eat: {data}\n\nWrite them as a sentence or two for a guide book.",
                "Turn the attributes of a restaurant into text.\n\nAttributes: {data}\nText:",
                "A friend asks about a restaurant of which you know this: {data}. What do you tell them?",
                "Write an entry for a list of restaurants. Use all of this: {data}",
                "Say it in full sentences: {data}",
                "Data: {data}\n\nRecommendation in words:",
            ),
            Template(
                "{answer}\n\nList what is said about the restaurant, as attributes and their values.", target="{data}"
            ),
            Template("Description: {answer}\nAttributes of the restaurant:", target="{data}"),
            Template(
                "Fill in a form (name, food, price range, area and so on, if they are given) from this text: {answer}",
                target="{data}",
            ),
        ),
    ),
    Task(
        name="web_nlg",
        cluster=CLUSTER,
        data="gem/web_nlg_en",
        reader=_web_nlg,
        metric="rouge",
        held_out="test",
        templates=(
            *asked(
                "{facts}\n\nWrite this down in natural language.",
                "Subject | property | value:\n{facts}\n\nIn a sentence or two:",
                "An encyclopedia keeps its knowledge in lines such as these:\n{facts}\n\nWrite the paragraph that a"
                " reader sees.",
                "Express all of these statements in good English.\n\n{facts}\n\nIn good English:",
                "Knowledge:\n{facts}\n\nText that states it:",
                "Tell a child what is said here.\n\n{facts}\n\nWhat it says is this:",
                "Combine the facts into one short text.\n\n{facts}\n\nCombined:",
            ),
            Template(
                "{answer}\n\nWrite each fact of this text as a line: subject | property | value.", target="{facts}"
            ),
            Template("Text: {answer}\nFacts in the form of triples:\n", target="{facts}"),
            Template("What would a knowledge base store, having read the following? {answer}", target="{facts}"),
        ),
    ),
)
