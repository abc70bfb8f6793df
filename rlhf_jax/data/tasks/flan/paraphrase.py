"""Paraphrase: do two sentences mean the same?"""

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.flan.readers import asked, example, labelled
from rlhf_jax.data.tasks.task import Example, Task, Template

CLUSTER = "paraphrase"
_NO_YES = ("no", "yes")
_PAIR = {"first": "sentence1", "second": "sentence2"}


def _stsb(row: Row) -> Example | None:
    score = float(row["label"])  # the mean of some people's scores from 0 to 5; negative where it is kept secret
    answer = str(int(score + 0.5)) if score >= 0 else ""
    return example({"first": row["sentence1"], "second": row["sentence2"]}, [answer], map(str, range(6)))


TASKS = (
    Task(
        name="mrpc",
        cluster=CLUSTER,
        data="glue/mrpc",
        reader=labelled(_PAIR, _NO_YES),
        templates=(
            *asked(
                "{first}\n{second}\n\nDo both sentences tell the same news?{options}\n\nAnswer:",
                "Sentence 1: {first}\nSentence 2: {second}\n\nIs the second a paraphrase of the first?{options}"
                "\n\nAnswer:",
                'Two papers write:\n- "{first}"\n- "{second}"\n\nDo they say the same thing?{options}\n\nAnswer:',
                "Could an editor swap one sentence for the other without changing the report?\n\n{first}\n\n{second}"
                "{options}\n\nAnswer:",
                "Compare.\n\nA. {first}\nB. {second}\n\nSame meaning?{options}\n\nAnswer:",
                '"{first}"\n\nHas the same been said here? "{second}"{options}\n\nAnswer:',
                "First: {first}\nSecond: {second}\n\nAre they equivalent?{options}\n\nThe answer is",
                "A search for news found these. Show just one of them if they are the same.\n\n- {first}\n-"
                " {second}{options}\n\nThe same?",
            ),
            Template(
                "{first}\n\nWrite a second sentence. Is it a paraphrase of the first? It should be: {answer}.",
                target="{second}",
            ),
            Template(
                'A pair of sentences is labelled "{answer}" for "same meaning". One of them is: {second}\n\nThe other:',
                target="{first}",
            ),
        ),
    ),
    Task(
        name="qqp",
        cluster=CLUSTER,
        data="glue/qqp",
        reader=labelled({"first": "question1", "second": "question2"}, _NO_YES),
        templates=(
            *asked(
                "{first}\n{second}\n\nWould one answer do for both questions?{options}\n\nAnswer:",
                "Question 1: {first}\nQuestion 2: {second}\n\nAre they the same question?{options}\n\nAnswer:",
                'A user of a forum asks "{first}" and another asks "{second}" Is the second question a duplicate?'
                "{options}\n\nAnswer:",
                "Should these two be merged into one thread?\n\n- {first}\n- {second}{options}\n\nAnswer:",
                "Do these ask for the same thing?\n\n{first}\n\n{second}{options}\n\nAnswer:",
                "Old question: {first}\nNew question: {second}\n\nHas the new one been asked before?{options}"
                "\n\nAnswer:",
                '"{first}" - in other words, "{second}" Is that right?{options}\n\nAnswer:',
                'Would somebody who has answered "{first}" thereby have answered "{second}" as well?{options}'
                "\n\nAnswer:",
            ),
            Template(
                "Question: {first}\n\nThink of another question. Does it ask the same? It should be: {answer}."
                "\n\nQuestion:",
                target="{second}",
            ),
            Template(
                "Question: {second}\n\nGive a question that somebody asked earlier; as to whether this is a duplicate"
                " of"
                " it, the verdict was: {answer}.",
                target="{first}",
            ),
        ),
    ),
    Task(
        name="paws_wiki",
        cluster=CLUSTER,
        data="paws_wiki/labeled_final_tokenized",
        reader=labelled(_PAIR, _NO_YES),
        held_out="test",
        templates=(
            *asked(
                "{first}\n{second}\n\nMany words are shared. Is the meaning shared as well?{options}\n\nAnswer:",
                "Sentence 1: {first}\nSentence 2: {second}\n\nIf the first is true, is the second true, and the other"
                " way"
                " round?{options}\n\nAnswer:",
                "Does rewording this\n\n{first}\n\nas this\n\n{second}\n\nkeep its meaning?{options}\n\nAnswer:",
                "Look closely at the order of the words. Are these paraphrases?\n\n1) {first}\n2) {second}{options}"
                "\n\nAnswer:",
                "An encyclopedia says: {first}\nA pupil writes: {second}\n\nIs what the pupil writes the same?{options}"
                "\n\nAnswer:",
                "Original: {first}\nRewritten: {second}\n\nIs the rewritten sentence faithful?{options}\n\nAnswer:",
                'Check whether "{first}" and "{second}" state the same fact.{options}\n\nAnswer:',
                "{first}\n\nSomebody has rearranged the words:\n\n{second}\n\nDoes it still say the same?{options}"
                "\n\nAnswer:",
                "Do these two lines agree in everything they say?\n\n{first}\n{second}{options}\n\nThey agree:",
            ),
            Template(
                "Move some words of this sentence about: {first}\n\nDoes the result still mean the same? It should be:"
                " {answer}.\n\nResult:",
                target="{second}",
            ),
        ),
    ),
    Task(
        name="stsb",
        cluster=CLUSTER,
        data="glue/stsb",
        reader=_stsb,
        templates=(
            *asked(
                "{first}\n{second}\n\nFrom 0 (nothing in common) to 5 (same meaning), how alike are they?{options}"
                "\n\nScore:",
                "Rate the similarity of two sentences from 0 to 5, where 5 means that they say the same."
                "\n\n1. {first}\n"
                "2. {second}{options}\n\nRating:",
                "Sentence A: {first}\nSentence B: {second}\n\nHow close in meaning, 5 being the closest and 0 the"
                " farthest?{options}\n\nCloseness:",
                'How many points out of 5 do you give "{second}" as a rendering of "{first}"?{options}\n\nPoints:',
                "On a scale that ends with 5 for equivalent sentences and starts with 0 for unrelated ones, where are"
                " these?\n\n{first}\n{second}{options}\n\nHere:",
                "One person says: {first}\nAnother says: {second}\n\nTo what degree do they say the same (0 to"
                " 5)?{options}"
                "\n\nDegree:",
                "Grade how well the meanings of the sentences agree. 0 is the lowest grade, 5 the highest.{options}\n\n"
                "First: {first}\nSecond: {second}\nGrade:",
                "Translators were given the same text. How near are their sentences, from 0 for far to 5 for equal?"
                "\n\n- {first}\n- {second}{options}\n\nNearness:",
            ),
            Template(
                "{first}\n\nWrite a sentence whose meaning is alike to the degree of {answer} on a scale from 0 to 5.",
                target="{second}",
            ),
            Template(
                'On a scale from 0 to 5, a sentence is as similar to "{second}" as {answer} says. Which sentence might'
                " it be?",
                target="{first}",
            ),
        ),
    ),
)
