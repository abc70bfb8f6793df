"""Commonsense: which of two or four things is the likely one?"""

import re

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.flan.readers import asked, chosen, example
from rlhf_jax.data.tasks.task import Example, Task, Template

CLUSTER = "commonsense"


def _copa(row: Row) -> Example | None:
    cause = row["question"] == "cause"
    options = [row["choice1"], row["choice2"]]
    fields = {
        "premise": row["premise"],
        "stem": row["premise"].strip().rstrip("."),
        "link": "because" if cause else "so",
        "asked": "cause" if cause else "effect",
    }
    return example(fields, chosen(options, row["label"]), options)


def _hellaswag(row: Row) -> Example | None:
    # Of the how-to pages come marks such as [header], [title], [step].
    context, *endings = (re.sub(r"\s*\[\w+\]\s*", " ", text).strip() for text in (row["context"], *row["endings"]))
    return example({"context": context, "topic": row["activity_label"]}, chosen(endings, row["label"]), endings)


def _piqa(row: Row) -> Example | None:
    options = [row["sol1"], row["sol2"]]
    return example({"goal": row["goal"]}, chosen(options, row["label"]), options)


def _story_cloze(row: Row) -> Example | None:
    return example({"story": row["context"]}, chosen(row["endings"], row["label"] - 1), row["endings"])  # from 1


TASKS = (
    Task(
        name="copa",
        cluster=CLUSTER,
        data="super_glue/copa",
        reader=_copa,
        templates=(
            *asked(
                "{premise} What is the most plausible {asked} of this?{options}\n\nAnswer:",
                "Complete the sentence.{options}\n\n{stem}, {link}",
                "Event: {premise}\n\nWhich of these is its {asked}?{options}\n\nThe {asked}:",
                "{premise}\n\nChoose the {asked}.{options}\n\nChoice:",
                "Of two sentences, pick the one that is the likelier {asked} of what happened: {premise}{options}"
                "\n\nPick:",
                '"{stem}, {link} ..." How does it go on?{options}\n\nIt goes on:',
                "I shall tell you something, and you find the {asked}. {premise}{options}\n\nThe {asked} is this:",
                "Situation: {premise}\n\nThink of its {asked}. Which of the two is it more likely to be?{options}"
                "\n\nMore likely:",
                'Connect the beginning "{stem}, {link}" with the end that makes sense.{options}\n\nEnd:',
            ),
            Template(
                "The {asked} of something that happened was this: {answer}\n\nWhat happened?",
                target="{premise}",
            ),
        ),
    ),
    Task(
        name="hellaswag",
        cluster=CLUSTER,
        data="hellaswag",
        reader=_hellaswag,
        templates=(
            *asked(
                "{context}\n\nWhat comes next?{options}\n\nNext:",
                "Topic: {topic}\n\n{context}\n\nWhich continuation makes sense?{options}\n\nContinuation:",
                "How does this text most likely continue?\n\n{context}{options}\n\nIt continues:",
                "Pick the ending that fits.\n\nBeginning: {context}{options}\n\nEnding:",
                'This is from a text about "{topic}".\n\n{context}{options}\n\nThe text goes on like this:',
                "Only one of the endings below belongs to the passage. Which?\n\nPassage: {context}{options}"
                "\n\nAnswer:",
                "Use your knowledge of the world to finish the description.{options}\n\n{context}",
                "You watch somebody, or read their instructions: {context}\n\nWhat would you expect now?{options}"
                "\n\nI expect this:",
            ),
            Template(
                "{answer}\n\nThis is how a text ends that is about: {topic}. How might it have begun?",
                target="{context}",
            ),
            Template("Write the beginning of a text which then goes on so: {answer}", target="{context}"),
        ),
    ),
    Task(
        name="piqa",
        cluster=CLUSTER,
        data="piqa",
        reader=_piqa,
        templates=(
            *asked(
                "Goal: {goal}\n\nWhich way works better?{options}\n\nAnswer:",
                "{goal}\n\nPick the sensible solution.{options}\n\nSolution:",
                "Somebody wants to do this: {goal}\nWhat would you advise?{options}\n\nAdvice:",
                "What should one do? {goal}{options}\n\nOne should do this:",
                "One of these instructions works in practice, the other does not. Which one works?\n\nTask: {goal}"
                "{options}\n\nAnswer:",
                "Think of how things behave when one handles them. {goal}{options}\n\nBest way:",
                'How would a practical person go about this: "{goal}"?{options}\n\nLike this:',
                "A beginner asks how to do this: {goal}\n\nOne of two replies is useful.{options}\n\nThe useful one:",
            ),
            Template(
                "Instructions: {answer}\n\nWhat are these instructions for?",
                target="{goal}",
            ),
            Template("Name a goal that one can reach as follows. {answer}\n\nGoal:", target="{goal}"),
        ),
    ),
    Task(
        name="story_cloze",
        cluster=CLUSTER,
        data="story_cloze/2016",
        reader=_story_cloze,
        train="validation",  # the stories of its training rows have no wrong endings to choose from
        held_out="test",
        templates=(
            *asked(
                "{story}\n\nHow does the story end?{options}\n\nEnding:",
                "Here are the first four sentences of a story. Choose the fifth.\n\n{story}{options}"
                "\n\nFifth sentence:",
                "Which ending suits this story?\n\n{story}{options}\n\nAnswer:",
                "Story: {story}\n\nOne of these sentences closes it well, the other makes no sense.{options}\n\nIt"
                " closes with:",
                "Finish the story.{options}\n\n{story}",
                "{story}\n\nWhat is most likely to have happened then?{options}\n\nThen:",
                "A page with the last line of this story is torn. {story}\n\nWhich line stood there?{options}\n\nLine:",
                'A child listens to this: {story}\n\n"And then?" asks the child.{options}\n\nAnd then:',
            ),
            Template("Write a story of four sentences to which this is the fifth: {answer}", target="{story}"),
            Template("{answer}\n\nThat was the end of a short story. Tell what came before.", target="{story}"),
        ),
    ),
)
