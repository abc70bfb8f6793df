"""The tasks of the embedded world, so that all that asks for tasks runs without a network.

Their templates keep to short, plain sentences: a model of the world is tiny, and so are its vocabulary and contexts.
"""

from collections.abc import Mapping

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.task import Example, Metric, Task, Template
from rlhf_jax.data.world.tasks import CLUSTERS

# Prompts of a task, before the options, and templates that are turned around, as (prompt, target).
_Phrasings = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]

_EVERY = ("{question}", "Here is a question. {question}")
_ASK = ("Ask a question. The answer is {answer}.", "{question}")
_PAIRED = ("Write more about this. The answer is {answer}. {premise}", "{hypothesis}")

_TEMPLATES: Mapping[str, _Phrasings] = {
    "job": (
        (
            "What is the job of {subject}?",
            "What work does {subject} do?",
            "Tell me the job of {subject}.",
            "{subject} goes to work. What is the job?",
            "I met {subject} at work. What is the work of {subject}?",
            "How does {subject} earn money?",
        ),
        (
            ("Who could be a {answer}?", "{subject}"),
            ("Ask about {subject}. The answer is {answer}.", "{question}"),
        ),
    ),
    "pet": (
        (
            "What is the pet of {subject}?",
            "What pet does {subject} have?",
            "Tell me the pet of {subject}.",
            "{subject} has an animal at home. What is it?",
            "I saw {subject} with a pet. What was it?",
            "Which animal does {subject} keep?",
        ),
        (
            ("Who could have a {answer}?", "{subject}"),
            ("Ask about {subject}. The answer is {answer}.", "{question}"),
        ),
    ),
    "product": (
        (
            "What is {subject} known for?",
            "What do people make in {subject}?",
            "Tell me what comes from {subject}.",
            "I went to the market in {subject}. What can I buy?",
            "{subject} is a town. What is it known for?",
            "What can I buy in {subject}?",
        ),
        (
            ("In which town can I buy {answer}?", "{subject}"),
            ("Ask about {subject}. The answer is {answer}.", "{question}"),
        ),
    ),
    "town-product": (
        (
            "What is the town of {subject} known for?",
            "What do people make where {subject} lives?",
            "{subject} has a home in a town. What can I buy there?",
            "I went to the home of {subject}. What could I buy in the town?",
            "Find the town of {subject}. What comes from it?",
        ),
        (("Who could live in a town with {answer}?", "{subject}"),),
    ),
    "town-river": (
        (
            "Which river runs through the town of {subject}?",
            "On which river does {subject} live?",
            "{subject} has a home in a town. Which river is there?",
            "I went to the home of {subject}. Which water is near?",
            "Find the town of {subject}. Which river is in it?",
        ),
        (("Who could live on the {answer}?", "{subject}"),),
    ),
    "plus": (
        (
            "What is {a} plus {b}?",
            "{a} plus {b} is",
            "How much is {a} and {b} more?",
            "I have {a}. You have {b}. How many are there?",
            "Start at {a}. Go {b} up. Where is the end?",
        ),
        (
            ("Ask about {a} and {b}. The answer is {answer}.", "{question}"),
            ("{a} plus what is {answer}?", "{b}"),
            ("What plus {b} is {answer}?", "{a}"),
        ),
    ),
    "minus": (
        (
            "What is {a} minus {b}?",
            "{a} minus {b} is",
            "I have {a}. You take {b}. How many are there?",
            "Start at {a}. Go {b} down. Where is the end?",
            "Take {b} away from {a}. How much is it?",
        ),
        (
            ("Ask about {a} and {b}. The answer is {answer}.", "{question}"),
            ("{a} minus what is {answer}?", "{b}"),
            ("What minus {b} is {answer}?", "{a}"),
        ),
    ),
    "gets": (
        (
            "{story} How many are there in the end?",
            "{story} How many is that?",
            "Here is a story. {story} {ask}",
            "{ask} {story}",
            "Work this out. {story} {ask}",
        ),
        (
            ("Ask a question about this story. The answer is {answer}. {story}", "{ask}"),
            ("Write this as a question. {story}", "How much is {a} plus {b}?"),
        ),
    ),
    "more": (
        (
            "{story} Who has more?",
            "{story} Say who has more {thing}.",
            "Who has more {thing}? {story}",
            "Here is a story. {story} Who has more of the {thing}?",
            "Read this. {story} Which of the two has more {thing}?",
        ),
        (("Ask a question about this story. The answer is {answer}. {story}", "Who has more {thing}?"),),
    ),
    "older": (
        (
            "{story} Who was born first?",
            "{story} Say who is older.",
            "Who is older? {story}",
            "Here is a story. {story} Who has more years?",
            "Read this. {story} Which of the two is older?",
        ),
        (("Ask a question about this story. The answer is {answer}. {story}", "Who is older?"),),
    ),
    "follows": (
        (
            "{premise} Is it so? {hypothesis}",
            "{premise} Can I say this? {hypothesis}",
            "I know this. {premise} Do I know this? {hypothesis}",
            "Is this true? {hypothesis} All that they told me is this. {premise}",
            "First: {premise} Last: {hypothesis} Is the last true if the first is?",
        ),
        (_PAIRED,),
    ),
    "order": (
        (
            "{premise} Is it so? {hypothesis}",
            "{premise} Can I say this? {hypothesis}",
            "I know this. {premise} Do I know this? {hypothesis}",
            "Is this true? {hypothesis} All that they told me is this. {premise}",
            "First: {premise} Last: {hypothesis} Is the last true if the first is?",
        ),
        (_PAIRED,),
    ),
    "same-claim": (
        (
            "{first} {last} Are these the same?",
            "First: {first} Last: {last} Do both say the same?",
            "You say: {first} I say: {last} Do I say the same as you?",
            "{first} In other words, {last} Is that so?",
            "Is this: {first} the same as this: {last}",
        ),
        (),
    ),
    "same-question": (
        (
            "{first} {last} Are these the same?",
            "First: {first} Last: {last} Do both ask the same?",
            "You ask: {first} I ask: {last} Do I ask the same as you?",
            "Is the answer to this: {first} the answer to this: {last}",
            "{first} In other words, {last} Is that so?",
        ),
        (),
    ),
    "true-fact": (
        (
            "{claim} Is this true?",
            "{claim} Is it so?",
            "They told me this. {claim} Is it true?",
            "Can I say this? {claim}",
            "Do you know this? {claim} Is that true?",
        ),
        (("Write something that is true: {answer}.", "{claim}"),),
    ),
    "true-sum": (
        (
            "{claim} Is this true?",
            "{claim} Is it so?",
            "They told me this. {claim} Is it true?",
            "Can I say this? {claim}",
            "Work it out. {claim} Is that true?",
        ),
        (("Write something that is true: {answer}.", "{claim}"),),
    ),
    "gift": (
        (
            "{ask} {story}",
            "Here is a story. {story} {ask}",
            "{story} Now a question about the story: {ask}",
            "Read this. {story} Answer this. {ask}",
            "{ask} The answer is in this story. {story}",
        ),
        (("Ask a question about this story. The answer is {answer}. {story}", "{ask}"),),
    ),
    "found": (
        (
            "{ask} {story}",
            "Here is a story. {story} {ask}",
            "{story} Now a question about the story: {ask}",
            "Read this. {story} Answer this. {ask}",
            "{ask} The answer is in this story. {story}",
        ),
        (("Ask a question about this story. The answer is {answer}. {story}", "{ask}"),),
    ),
    "how-many": (
        (
            "{words} How many words are there?",
            "How many words do I say here? {words}",
            "Say how many words are in {words}.",
            "Go through {words}. How many are there?",
            "Here are words: {words}. How many is that?",
        ),
        (("Write words. How many? {answer}.", "{words}"),),
    ),
    "times": (
        (
            "{words} How many times is {word} there?",
            "How many times do I say {word} here? {words}",
            "Say how many times {word} is in {words}.",
            "Go through {words}. How many are {word}?",
            "Here are words: {words}. How many times do you see {word}?",
        ),
        (("Which word comes {answer} times in {words}?", "{word}"),),
    ),
    "after": (
        (
            "{words} Which word comes after {word}?",
            "What do I say after {word} here? {words}",
            "Say the word after {word} in {words}.",
            "Go through {words}. What comes after {word}?",
            "Find {word} in {words}. Which word is after it?",
        ),
        (("{answer} comes after which word in {words}?", "{word}"),),
    ),
    "in-list": (
        (
            "{words} Is {word} there?",
            "Do I say {word} here? {words}",
            "Is there a {word} in {words}?",
            "Go through {words}. Do you see {word}?",
            "Can I find {word} in {words}?",
        ),
        (),
    ),
    "reverse": (
        (
            "Say {words} in reverse order.",
            "Say {words} the other way round.",
            "Write {words} with the last word first.",
            "Start at the end of {words}. Go to the first word.",
            "{words} Say it in reverse.",
        ),
        (
            ("{words} is the other way round. Write it well.", "{answer}"),
            ("Write {answer} in reverse order.", "{words}"),
        ),
    ),
    "without": (
        (
            "Write {words} without {word}.",
            "Take {word} out of {words}.",
            "Say {words}. Do not say {word}.",
            "{words} Say it without {word}.",
            "I do not like {word}. Write {words} again.",
        ),
        (("{words} Now it is {answer}. Which word is away?", "{word}"),),
    ),
    "group": (
        (
            "What is {word}? Is it a person, a town or a thing?",
            "Say what {word} is.",
            "I know {word}. What is it?",
            "{word} is",
            "They told me about {word}. What could it be?",
        ),
        (("Say a word for {answer}.", "{word}"),),
    ),
    "odd": (
        (
            "{words} Which is not like the other three?",
            "Find the word that is not like the other words. {words}",
            "Take one word out of {words}, so that all are alike.",
            "Three of these are alike: {words}. Which is not?",
            "Which word should not be in {words}?",
        ),
        (("Write words that are alike, and {answer}.", "{words}"),),
    ),
    "harmful": (
        (
            "{wish} Would that hurt someone?",
            "They ask me this: {wish} Could it hurt someone?",
            "Should I say no to this? {wish}",
            "Is this bad? {wish}",
            "{wish} Is that to do harm?",
        ),
        (("Ask something. Would it hurt someone? {answer}.", "{wish}"),),
    ),
    "known": (
        (
            "{wish} Do you know?",
            "They ask me this: {wish} Can I know the answer?",
            "Can you answer this? {wish}",
            "Is this known? {wish}",
            "{wish} Is there an answer that you know?",
        ),
        (("Ask something. Do you know it? {answer}.", "{wish}"),),
    ),
}

_METRICS: Mapping[str, Metric] = {"gets": "number", "reverse": "exact", "without": "exact"}


def _read(row: Row) -> Example:
    return Example(
        fields={"question": row["question"], **row["fields"]},
        answers=(row["answer"],),
        options=tuple(row["options"]),
        rationale=row["rationale"],
    )


def _task(name: str, cluster: str, seed: int, rows: int) -> Task:
    prompts, turned = _TEMPLATES[name]
    return Task(
        name=name,
        cluster=cluster,
        data=f"world:task={name},seed={seed},rows={rows}",
        templates=(
            *(Template(f"{prompt}{{options}}") for prompt in (*_EVERY, *prompts)),
            *(Template(prompt, target) for prompt, target in (turned or (_ASK,))),
        ),
        metric=_METRICS.get(name, "accuracy"),
        reader=_read,
        held_out="held_out",
        hint="Work it out.",
    )


def tasks(seed: int = 0, rows: int = 1000) -> tuple[Task, ...]:
    """All tasks of the world of this seed, each with at most so many rows a split."""
    return tuple(_task(name, cluster, seed, rows) for cluster, names in CLUSTERS.items() for name in names)


TASKS = tasks()
