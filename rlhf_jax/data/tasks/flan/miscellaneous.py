"""Tasks that belong to no other cluster: conversations, the sense of words, kinds of questions, grammar, algebra,"
" punctuation."""

import re

from rlhf_jax.data.rows import Row
from rlhf_jax.data.tasks.flan.readers import asked, example, labelled, written
from rlhf_jax.data.tasks.flan.reading import UNANSWERABLE
from rlhf_jax.data.tasks.task import Example, Task, Template

CLUSTER = "miscellaneous"


def _coqa(row: Row) -> Example | None:
    """The last question of a conversation; those before it, which it may refer to, with their answers."""
    answers = [answer["input_text"] for answer in row["answers"]]
    if not answers or len(answers) != len(row["questions"]):
        return None
    *before, question = row["questions"]
    turns = [f"Q: {asked}\nA: {answer}\n" for asked, answer in zip(before, answers, strict=False)]
    fields = {"story": row["story"], "conversation": "".join([*turns, f"Q: {question}"]), "question": question}
    return example(fields, answers[-1:])


def _quac(row: Row) -> Example | None:
    answers = [row["orig_answer"]["text"], *(answer["text"] for answer in row["answers"])]
    fields = {
        "title": row["title"],
        "section": row["section_title"],
        "passage": row["context"].removesuffix("CANNOTANSWER"),
        "question": row["question"],
    }
    return example(fields, [UNANSWERABLE if answer == "CANNOTANSWER" else answer for answer in answers])


def _fix_punctuation(row: Row) -> Example | None:
    """An English sentence without its punctuation; None where it has none."""
    bare = " ".join(re.sub(r"[^\w\s]|_", "", row["en"]).split())
    return None if bare == row["en"].strip() else example({"bare": bare}, [row["en"]])


TASKS = (
    Task(
        name="coqa",
        cluster=CLUSTER,
        data="coqa",
        reader=_coqa,
        metric="f1",
        held_out="test",
        templates=(
            *asked(
                "{story}\n\n{conversation}\nA:",
                "Two people talk about a text.\n\nText: {story}\n\n{conversation}\n\nWhat is the answer to the last"
                " question?",
                "Read the story and continue the conversation.\n\n{story}\n\n{conversation}\nA:",
                "{story}\n\nA teacher and a pupil go through this story.\n\n{conversation}\n\nThe pupil replies:",
                "Answer the last of these questions, going by the story. Be brief.\n\n{conversation}"
                "\n\nStory: {story}\n\n"
                "Answer:",
                "Passage: {story}\n\nDialogue about the passage:\n{conversation}\nA:",
                "Reply in a few words to what is asked last.\n\nContext: {story}\n\n{conversation}\n\nReply:",
                "Somebody has read this and is asked about it.\n\nWhat they read: {story}\n\nWhat was said so"
                " far:\n{conversation}\n\nWhat they say now:",
                "Short answers, please.\n\nText: {story}\n\n{conversation}\nA:",
            ),
            Template(
                "{story}\n\nAsk a question about this story to which one can reply: {answer}", target="{question}"
            ),
        ),
    ),
    Task(
        name="quac",
        cluster=CLUSTER,
        data="quac",
        reader=_quac,
        metric="f1",
        templates=(
            *asked(
                'Article "{title}", section "{section}":\n{passage}\n\nQuestion: {question}\nIf the section does not'
                " tell,"
                " write: no answer.\nAnswer:",
                "A student wants to learn about {title} ({section}) from a teacher who has the text below. Reply with"
                " words"
                ' of the text, or with "no answer".\n\n{passage}\n\nStudent: {question}\nTeacher:',
                '{question}\n\nThis is on {title}, {section}. Quote the part that answers it, or say "no answer".\n\n'
                "{passage}\n\nAnswer:",
                "{title} - {section}\n\n{passage}\n\n{question} (Say what the text says; if it says nothing: no"
                " answer.)",
                "Look for the answer in this text on {title}, {section}.\n\n{passage}\n\nWhat is asked:"
                " {question}\nWhat"
                ' the text says ("no answer" if nothing):',
                'You know about {title} what stands under "{section}":\n{passage}\n\nSomebody asks you: {question}'
                " What do"
                ' you reply? If you do not know, reply "no answer".',
                "Title: {title}\nSection: {section}\nText: {passage}\nQuestion: {question}\nAnswer (or: no answer):",
                "An encyclopedia article on {title} has a section called {section}. It says: {passage}\n\nFrom that,"
                " answer this, or say that there is no answer: {question}",
                "Q: {question}\nSource: {title}, {section}: {passage}\nA (the words of the source, or no answer):",
            ),
            Template(
                '{passage}\n\nThis is from the section "{section}" of an article on {title}. What question leads to the'
                " following reply? {answer}",
                target="{question}",
            ),
        ),
    ),
    Task(
        name="wic",
        cluster=CLUSTER,
        data="super_glue/wic",
        reader=labelled({"word": "word", "first": "sentence1", "second": "sentence2"}, ("no", "yes")),
        templates=(
            *asked(
                '{first}\n{second}\n\nDoes "{word}" mean the same in both sentences?{options}\n\nAnswer:',
                'Take the word "{word}". Is it used in one and the same sense here?\n\n1. {first}\n2. {second}{options}'
                "\n\nAnswer:",
                'Would a dictionary list these uses of "{word}" under one sense?\n\n- {first}\n- {second}{options}'
                "\n\nAnswer:",
                "Word: {word}\nSentence A: {first}\nSentence B: {second}\n\nSame sense?{options}\n\nAnswer:",
                '"{first}" Here, "{word}" has some meaning. Has it that meaning in "{second}" too?{options}\n\nAnswer:',
                'A learner of English has understood "{word}" in this sentence: {first}\nWill that help with the next?'
                " {second}{options}\n\nAnswer:",
                "Compare how a word is used twice.\n\nThe word: {word}\nOnce: {first}\nAgain: {second}"
                "\n\nIs its meaning"
                " unchanged?{options}\n\nAnswer:",
                'Is there one idea behind "{word}" in these two lines?\n\n{first}\n{second}{options}\n\nAnswer:',
            ),
            Template(
                '{first}\n\nWrite another sentence with the word "{word}". Does the word mean the same there? It should'
                " be: {answer}.",
                target="{second}",
            ),
            Template(
                'Sentence: {second}\nUse "{word}" in a sentence of your own. As to whether the sense is the same:'
                " {answer}.",
                target="{first}",
            ),
        ),
    ),
    Task(
        name="trec",
        cluster=CLUSTER,
        data="trec",
        reader=labelled(
            {"question": "text"},
            ("description", "entity", "abbreviation", "person", "number", "place"),
            label="label-coarse",
        ),
        held_out="test",
        templates=(
            *asked(
                "{question}\n\nWhat kind of thing is asked for?{options}\n\nKind:",
                "Question: {question}\n\nThe answer will be which of these?{options}\n\nThe answer will be:",
                "Sort questions by what they ask for.{options}\n\nQuestion: {question}\nAsks for:",
                'Somebody asks "{question}" What do they want to hear?{options}\n\nThey want to hear:',
                "Do not answer the question. Tell what type of answer it needs.\n\n{question}{options}\n\nType:",
                "Label this question for a search engine: {question}{options}\n\nLabel:",
                "Which category does the question below belong to?{options}\n\n{question}\n\nCategory:",
            ),
            Template("Ask a question whose answer is of this kind: {answer}.", target="{question}"),
            Template("Kind of answer: {answer}\nQuestion:", target="{question}"),
            Template('For a quiz I need a question of the category "{answer}". Please write one.', target="{question}"),
        ),
    ),
    Task(
        name="cola",
        cluster=CLUSTER,
        data="glue/cola",
        reader=labelled({"sentence": "sentence"}, ("unacceptable", "acceptable")),
        templates=(
            *asked(
                "{sentence}\n\nIs this an acceptable sentence of English?{options}\n\nAnswer:",
                'Would a native speaker say "{sentence}"? Judge the grammar.{options}\n\nThe grammar is',
                "Sentence: {sentence}\n\nHow does it sound to somebody who knows English well?{options}\n\nIt is",
                "Check the grammar of the sentence below.\n\n{sentence}{options}\n\nResult:",
                "A linguist marks sentences that nobody would say as unacceptable.{options}\n\nSentence:"
                " {sentence}\nMark:",
                "{sentence}\n\nIs that well formed?{options}\n\nIt is",
                "Proofreading: can this stay as it is (acceptable), or not? {sentence}{options}\n\nDecision:",
                "An editor stops at this sentence: {sentence}\n\nWhat is the verdict on its grammar?{options}"
                "\n\nVerdict:",
            ),
            Template("Give an example of a sentence whose grammar is {answer}.", target="{sentence}"),
            Template("A linguist calls a sentence {answer}. Which sentence could that be?", target="{sentence}"),
        ),
    ),
    Task(
        name="math",
        cluster=CLUSTER,
        data="math_dataset/algebra__linear_1d",
        reader=written({"question": "question"}, "answer"),
        metric="number",
        held_out="test",
        templates=(
            *asked(
                "{question}",
                "{question}\n\nSolution:",
                "Problem: {question}\nAnswer:",
                "Here is an exercise in algebra. {question}\n\nThe result:",
                "Find the unknown. {question}",
                "A pupil has to do this for homework: {question}\nWhich number should the pupil write down?",
                "Calculate, and give nothing but the number. {question}",
            ),
            Template("Write an equation to be solved, of which the solution is {answer}.", target="{question}"),
            Template("Solution: {answer}\nExercise in algebra:", target="{question}"),
            Template("A teacher needs a linear equation whose solution is {answer}. Please help.", target="{question}"),
        ),
    ),
    Task(
        name="fix_punctuation",
        cluster=CLUSTER,
        data="para_crawl/enda",  # its English side; no translation task learns from it
        reader=_fix_punctuation,
        metric="bleu",  # counts punctuation, as exact and rouge do not
        train="train[:-1000]",  # all of its rows are in the one split "train"
        held_out="train[-1000:]",
        templates=(
            *asked(
                "{bare}\n\nAdd the punctuation.",
                "The punctuation of this sentence got lost. Put it back: {bare}",
                "Where do commas, stops and other marks belong? {bare}\n\nWith marks:",
                "Text without punctuation: {bare}\nText with punctuation:",
                "Copy the sentence and punctuate it properly.\n\n{bare}\n\nCopy:",
                "Somebody dictated this: {bare}\n\nWrite it down as it should be written.",
                "Correct the punctuation, and nothing else. {bare}\n\nCorrected:",
            ),
            Template("Remove all punctuation from the following. {answer}", target="{bare}"),
            Template("With punctuation: {answer}\nWithout:", target="{bare}"),
            Template("{answer}\n\nWrite this again with letters, digits and spaces alone.", target="{bare}"),
        ),
    ),
)
