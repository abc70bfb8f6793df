"""Coreference: whom or what does a word stand for?"""

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.flan.readers import asked, chosen, example
from rlhf_jax.data.tasks.task import Example, Task, Template

CLUSTER = "coreference"


def _definite_pronoun(row: Row) -> Example | None:
    fields = {"sentence": row["sentence"], "pronoun": row["pronoun"]}
    return example(fields, chosen(row["candidates"], row["label"]), row["candidates"])


def _winogrande(row: Row) -> Example | None:
    options = [row["option1"], row["option2"]]
    return example({"sentence": row["sentence"].replace("_", "___")}, chosen(options, row["label"]), options)


def _wsc273(row: Row) -> Example | None:
    start, end = row["pronoun_start"], row["pronoun_end"]  # a sentence may have the pronoun several times
    fields = {
        "sentence": f"{row['text'][:start]}*{row['text'][start:end]}*{row['text'][end:]}",
        "pronoun": row["pronoun_text"],
    }
    options = [row["option1"], row["option2"]]
    return example(fields, chosen(options, row["label"]), options)


TASKS = (
    Task(
        name="definite_pronoun_resolution",
        cluster=CLUSTER,
        data="definite_pronoun_resolution",
        reader=_definite_pronoun,
        held_out="test",
        templates=(
            *asked(
                '{sentence}\n\nWho or what is "{pronoun}"?{options}\n\nAnswer:',
                'In the sentence below, what does "{pronoun}" refer to?\n\n{sentence}{options}\n\nIt refers to:',
                'Sentence: {sentence}\n\nReplace "{pronoun}" by one of these without changing the meaning.{options}\n\n'
                "Replacement:",
                'Find the antecedent of the pronoun "{pronoun}".\n\n{sentence}{options}\n\nAntecedent:',
                '{sentence}\n\nA reader is not sure who is meant by "{pronoun}". Help them.{options}\n\nThis is meant:',
                'Resolve the pronoun.{options}\n\nText: {sentence}\nPronoun: "{pronoun}"\nStands for:',
                'When I say "{sentence}" then by "{pronoun}" I mean which of the two?{options}\n\nI mean:',
                'Does "{pronoun}" mean the one or the other in this sentence? {sentence}{options}\n\nIt means:',
                '{sentence}\n\nQuestion: who or what does the writer have in mind with "{pronoun}"?{options}'
                "\n\nAnswer:",
            ),
            Template(
                'Write a sentence in which the pronoun "{pronoun}" stands for "{answer}", though it could be taken for'
                " something else.",
                target="{sentence}",
            ),
        ),
    ),
    Task(
        name="winogrande",
        cluster=CLUSTER,
        data="winogrande",
        reader=_winogrande,
        train="train_xl",  # the largest of five training splits, each of which holds the smaller ones
        templates=(
            *asked(
                "{sentence}\n\nWhat belongs in the gap?{options}\n\nAnswer:",
                "Fill in the blank.{options}\n\n{sentence}\n\nThe blank:",
                "Which of the two makes sense at the place of the line?\n\n{sentence}{options}\n\nAnswer:",
                "Sentence: {sentence}\n\nA name or noun is missing. Choose.{options}\n\nMissing:",
                'Read "{sentence}" and say what ___ must be.{options}\n\n___ is:',
                "Complete it sensibly: {sentence}{options}\n\nPut in:",
                "Only one of these words fits the meaning of the sentence.{options}\n\n{sentence}\n\nThe one that"
                " fits:",
                "Two things are named, and one of them is left out at ___. Which?\n\n{sentence}{options}\n\nLeft out:",
                "Copying this sentence, somebody could not read a word: {sentence}\n\nWhat does it say"
                " there?{options}\n\nIt says:",
            ),
            Template(
                'Write a sentence with a gap (___) for which "{answer}" is right, and something else in the sentence'
                " would be wrong.",
                target="{sentence}",
            ),
        ),
    ),
    Task(
        name="wsc273",
        cluster=CLUSTER,
        data="wsc273",
        reader=_wsc273,
        train="test[:50%]",  # all of its rows are in the one split "test"
        held_out="test[50%:]",
        templates=(
            *asked(
                "{sentence}\n\nWho or what is meant by *{pronoun}*?{options}\n\nAnswer:",
                "A pronoun is marked in this text: {sentence}\n\nWhat does it refer to?{options}\n\nIt refers to:",
                "Read carefully.\n\n{sentence}\n\nThe word between the asterisks stands for which of these?{options}"
                "\n\nAnswer:",
                "Which phrase could take the place of *{pronoun}*?{options}\n\n{sentence}\n\nPhrase:",
                "{sentence}\n\nPut a name to *{pronoun}*.{options}\n\nName:",
                "Schoolwork: say what the pronoun *{pronoun}* means here. {sentence}{options}\n\nIt means:",
                "Text: {sentence}\nQuestion: *{pronoun}*, that is to say?{options}\n\nThat is to say:",
                "To translate this, one must know who or what *{pronoun}* is: {sentence}{options}\n\n*{pronoun}* is:",
                "Explain the pronoun.\n\nSentence: {sentence}\nPronoun: *{pronoun}*{options}\n\nExplanation:",
            ),
            Template(
                "Write a text with the pronoun *{pronoun}*, put between asterisks, that only common sense can tell to"
                ' mean "{answer}".',
                target="{sentence}",
            ),
        ),
    ),
)
