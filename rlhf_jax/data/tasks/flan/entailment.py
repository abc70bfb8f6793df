"""Natural language inference: does a statement follow from a text?"""

from rlhf_jax.data.tasks.flan.readers import asked, labelled
from rlhf_jax.data.tasks.task import Task, Template

CLUSTER = "entailment"
_PAIR = {"premise": "premise", "hypothesis": "hypothesis"}
_YES_MAYBE_NO = ("yes", "maybe", "no")

_ANLI = (
    *asked(
        '{premise}\n\nGoing by this text alone, is it true that "{hypothesis}"?{options}\n\nAnswer:',
        "Read the text and judge the claim.\n\nText: {premise}\nClaim: {hypothesis}{options}\n\nIs the claim right?",
        "Text: {premise}\n\nCan one conclude that the following holds?\n{hypothesis}{options}\n\nAnswer:",
        "Here is what we know: {premise}\n\nSomebody says: {hypothesis}\n\nAre they right?{options}\n\nAnswer:",
        "Statement: {hypothesis}\n\nCheck the statement against this passage.\n\n{premise}{options}\n\nDoes it hold?",
        'Paragraph:\n{premise}\n\nQuestion: does the paragraph support "{hypothesis}"?{options}\n\nAnswer:',
        "{premise}\n\nTrue or not, judging by the above? {hypothesis}\n\nIf the passage leaves it open, say maybe."
        "{options}\n\nAnswer:",
    ),
    Template(
        "{premise}\n\nWrite a statement about this passage such that the answer to "
        "\"Is the statement true, judging by the passage?\" is '{answer}'.\n\nStatement:",
        target="{hypothesis}",
    ),
    Template(
        'Write a paragraph. A reader who is asked whether "{hypothesis}" follows from it should answer: {answer}.'
        "\n\nParagraph:",
        target="{premise}",
    ),
    Template(
        "Passage: {premise}\nA teacher asks whether a certain sentence is true, and the right reply is"
        ' "{answer}". Which sentence could it be?',
        target="{hypothesis}",
    ),
)


def _anli(number: int) -> Task:
    return Task(
        name=f"anli-r{number}",
        cluster=CLUSTER,
        data=f"anli/r{number}",
        templates=_ANLI,
        reader=labelled({"premise": "context", "hypothesis": "hypothesis"}, _YES_MAYBE_NO),
        held_out="test",
    )


TASKS = (
    _anli(1),
    _anli(2),
    _anli(3),
    Task(
        name="cb",
        cluster=CLUSTER,
        data="super_glue/cb",
        reader=labelled(_PAIR, ("yes", "no", "maybe")),
        templates=(
            *asked(
                '{premise}\n\nDoes the writer of these lines believe that "{hypothesis}"?{options}\n\nAnswer:',
                "Discourse: {premise}\n\nAfter reading it, would you say that {hypothesis}?{options}\n\nYou say:",
                "Somebody said or wrote this:\n{premise}\n\nDoes it commit them to the view that {hypothesis}?{options}"
                "\n\nAnswer:",
                'If the following is true, is "{hypothesis}" true as well?\n\n{premise}{options}\n\nAnswer:',
                "Context: {premise}\nConclusion: {hypothesis}\n\nIs the conclusion justified?{options}\n\nAnswer:",
                "Decide whether the second text follows from the first.\n\nFirst: {premise}\nSecond: {hypothesis}"
                "{options}\n\nDecision:",
                "{premise}\n\nIs it so that {hypothesis}?{options}\n\nReply:",
                "Should someone who trusts the speaker below think that {hypothesis}?\n\n{premise}{options}\n\nAnswer:",
            ),
            Template(
                "{premise}\n\nName something of which one can say '{answer}' when asked whether the speaker holds it"
                " to be true.",
                target="{hypothesis}",
            ),
            Template(
                'Write a snippet of a conversation or a story. Asked whether it implies that "{hypothesis}", a reader'
                " would answer: {answer}.\n\nSnippet:",
                target="{premise}",
            ),
        ),
    ),
    Task(
        name="mnli",  # genres that its training rows lack are in a split of their own: validation_mismatched
        cluster=CLUSTER,
        data="glue/mnli",
        reader=labelled(_PAIR, _YES_MAYBE_NO),
        held_out="validation_matched",
        templates=(
            *asked(
                "Premise: {premise}\nHypothesis: {hypothesis}\n\nDoes the premise entail the hypothesis?{options}"
                "\n\nAnswer:",
                "{premise}\n\nIf that is so, must this be so as well? {hypothesis}{options}\n\nAnswer:",
                "Sentence A: {premise}\nSentence B: {hypothesis}\n\nSuppose A is true. Is B true?{options}\n\nAnswer:",
                'Someone tells you: "{premise}" Do you now know that "{hypothesis}"?{options}\n\nYour answer:',
                "{hypothesis}\n\nDoes the sentence above follow from the one below?\n\n{premise}{options}\n\nAnswer:",
                "Take this for a fact: {premise}\nWhat about this: {hypothesis}\nIs it a fact as well?{options}"
                "\n\nAnswer:",
                "We read: {premise}\nWe are asked to infer: {hypothesis}\nIs the inference sound? Say maybe if it"
                " cannot be told.{options}\n\nAnswer:",
            ),
            Template(
                "Premise: {premise}\nThe answer to whether the hypothesis follows from the premise is: {answer}."
                "\nHypothesis:",
                target="{hypothesis}",
            ),
            Template(
                "Hypothesis: {hypothesis}\nThe answer to whether the hypothesis follows from the premise is: {answer}."
                "\nPremise:",
                target="{premise}",
            ),
            Template(
                '"{premise}"\n\nMake up a sentence. Whoever is asked if it must be true, given the quotation, should'
                " answer {answer}.",
                target="{hypothesis}",
            ),
        ),
    ),
    Task(
        name="qnli",
        cluster=CLUSTER,
        data="glue/qnli",
        reader=labelled({"question": "question", "sentence": "sentence"}, ("yes", "no")),
        templates=(
            *asked(
                "Question: {question}\nSentence: {sentence}\n\nDoes the sentence answer the question?{options}"
                "\n\nAnswer:",
                '{sentence}\n\nCan you tell from this sentence: "{question}"?{options}\n\nAnswer:',
                "Somebody asks: {question}\nYou find this line: {sentence}\nIs it what they are looking for?{options}"
                "\n\nAnswer:",
                "Is the information in the second line enough to answer the first?\n\n{question}\n{sentence}{options}"
                "\n\nAnswer:",
                'A search for "{question}" returned the following.\n\n{sentence}\n\nIs the answer in there?{options}'
                "\n\nAnswer:",
                "Text: {sentence}\nA pupil who has read this text alone is asked: {question}\nCan the pupil know the"
                " answer?{options}\n\nAnswer:",
                "Here is a question: {question} Does the following sentence contain its answer?\n{sentence}{options}"
                "\n\nReply:",
                'Does one find out from "{sentence}" what was asked with "{question}"?{options}\n\nAnswer:',
            ),
            Template(
                '{sentence}\n\nAsk a question about this. To "Does the sentence answer your question?" the reply must'
                " be: {answer}.\n\nQuestion:",
                target="{question}",
            ),
            Template(
                "Question: {question}\nWrite a sentence on this subject. Does it answer the question? The reply must"
                " be: {answer}.\n\nSentence:",
                target="{sentence}",
            ),
        ),
    ),
    Task(
        name="rte",
        cluster=CLUSTER,
        data="super_glue/rte",
        reader=labelled(_PAIR, ("yes", "no")),
        templates=(
            *asked(
                '{premise}\n\nDoes this report say or imply that "{hypothesis}"?{options}\n\nAnswer:',
                "News: {premise}\n\nHeadline: {hypothesis}\n\nIs the headline backed by the news?{options}\n\nAnswer:",
                "Text: {premise}\nHypothesis: {hypothesis}\n\nWould a careful reader of the text accept the hypothesis?"
                "{options}\n\nAnswer:",
                "You have read the following:\n{premise}\n\nMay you write this?\n{hypothesis}{options}\n\nAnswer:",
                "{hypothesis}\n\nIs there evidence for this in the passage?\n\nPassage: {premise}{options}\n\nAnswer:",
                "Fact checking. The source: {premise} The claim: {hypothesis} Does the source bear out the claim?"
                "{options}\n\nAnswer:",
                "{hypothesis}\n\nDoes that follow from these lines?\n\n{premise}{options}\n\nAnswer:",
                "A reporter has these notes: {premise}\n\nCan the reporter print this without further research?"
                " {hypothesis}{options}\n\nAnswer:",
            ),
            Template(
                "Source: {premise}\n\nWrite a claim. Does it follow from the source? It should be: {answer}.\n\nClaim:",
                target="{hypothesis}",
            ),
            Template(
                'Write a few lines of news. Does "{hypothesis}" follow from them? It should be: {answer}.\n\nNews:',
                target="{premise}",
            ),
        ),
    ),
    Task(
        name="snli",
        cluster=CLUSTER,
        data="snli",
        reader=labelled(_PAIR, _YES_MAYBE_NO),
        held_out="test",
        templates=(
            *asked(
                "A photo shows this: {premise}\n\nIs the following true of the photo? {hypothesis}{options}\n\nAnswer:",
                "Caption: {premise}\nDescription: {hypothesis}\n\nDoes the description fit the scene of the caption?"
                "{options}\n\nAnswer:",
                'Imagine the scene: "{premise}" Now, is it the case that "{hypothesis}"?{options}\n\nAnswer:',
                "What you see: {premise}\nWhat your friend says about it: {hypothesis}\n\nIs your friend right?"
                "{options}\n\nAnswer:",
                "{premise}\n{hypothesis}\n\nIf the first sentence describes a picture, does the second describe it too?"
                "{options}\n\nAnswer:",
                "Tell whether a statement is true of a situation.\n\nSituation: {premise}\nStatement: {hypothesis}"
                "{options}\n\nIs it true?",
                "All we know is this: {premise}\n\nCan we be certain of the following? {hypothesis}{options}"
                "\n\nAnswer:",
            ),
            Template(
                "Scene: {premise}\n\nSay something about the scene. Is it true? The answer should be: {answer}.\n\nYou"
                " say:",
                target="{hypothesis}",
            ),
            Template(
                'Describe a photo in one sentence. Is it true of the photo that "{hypothesis}"? The answer should be:'
                " {answer}.\n\nPhoto:",
                target="{premise}",
            ),
            Template(
                'A quiz shows a picture with the caption "{premise}" The right answer to the quiz\'s question is'
                ' "{answer}". What statement does the quiz ask about?',
                target="{hypothesis}",
            ),
        ),
    ),
    Task(
        name="wnli",
        cluster=CLUSTER,
        data="glue/wnli",
        reader=labelled({"premise": "sentence1", "hypothesis": "sentence2"}, ("no", "yes")),
        templates=(
            *asked(
                "{premise}\n\nDoes this mean that the following is true? {hypothesis}{options}\n\nAnswer:",
                "First sentence: {premise}\nSecond sentence: {hypothesis}\n\nDoes the second spell out correctly what"
                " the first says?{options}\n\nAnswer:",
                'When one reads "{premise}", should one understand that "{hypothesis}"?{options}\n\nAnswer:',
                "Mind what the pronouns stand for.\n\n{premise}\n{hypothesis}\n\nIs the second line right?{options}"
                "\n\nAnswer:",
                "Somebody writes: {premise}\nA reader understands: {hypothesis}\nHas the reader understood it?{options}"
                "\n\nAnswer:",
                "{premise}\n\nIs it right, then, to say this? {hypothesis}{options}\n\nAnswer:",
                "Can the first be replaced by the second without saying anything false?\n\n1. {premise}\n"
                "2. {hypothesis}{options}\n\nAnswer:",
                'If someone said "{premise}" and meant it, would they agree that "{hypothesis}"?{options}\n\nAnswer:',
                "Original: {premise}\nIn plainer words: {hypothesis}\n\nAre the plainer words correct?{options}"
                "\n\nAnswer:",
            ),
            Template(
                "{premise}\n\nSay who or what is meant, in one sentence. Is your sentence right? It should be:"
                ' "{answer}".',
                target="{hypothesis}",
            ),
        ),
    ),
)
