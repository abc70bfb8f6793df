"""FLAN's data sets: each reader against TFDS's own features, without a download, and what each template says."""

import collections
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from rlhf_jax.data import builders, sources
from rlhf_jax.data.tasks import Example, flan, in_words
from rlhf_jax.types import InputError

BY_NAME = {task.name: task for task in flan.TASKS}
all_tasks = pytest.mark.parametrize("task", flan.TASKS, ids=[task.name for task in flan.TASKS])

# Features that only some of a set's templates mention, because the answer can be told without them.
OPTIONAL = {"hellaswag": {"activity_label"}, "wsc273": {"pronoun_text"}}


@functools.cache
def builder(data):
    return sources._find(data, data, Path("nowhere"))()


def fake(feature, path="", changed=None, number=0):
    """A value that a feature may have: texts say where they are, and that at `changed` says something else."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: fake(one, f"{path}/{name}".strip("/"), changed, number) for name, one in feature.items()}
    if isinstance(feature, tfds.features.Sequence):
        return [fake(feature.feature, path, changed, k) for k in range(4)][: feature._length]
    if isinstance(feature, tfds.features.ClassLabel):
        return number
    if np.dtype(feature.np_dtype).kind == "O":
        return f"{'Changed' if path == changed else 'Some'} text, {path.replace('/', ' ')}, {number}"
    return np.dtype(feature.np_dtype).type(1)


def record(task, changed=None, **values):
    """A record of a task's data set, as its builder would store it."""
    row = fake(builder(task.data).info.features, changed=changed)
    if "entities" in row:  # of which the answers are some
        row["answers"] = row["entities"][1:3]
    if "polarity" in row:
        row["polarity"] = 4
    if "pronoun_start" in row:
        row |= {"pronoun_start": 2, "pronoun_end": 5}
    return row | values


def read(task, row, monkeypatch):
    """What a task reads of a record that has been stored by TFDS and is found in a folder of data."""
    features = builder(task.data).info.features

    class Records:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return features.deserialize_example_np(features.serialize_example(features.encode_example(row)))

    monkeypatch.setattr(builders, "open_records", lambda make, where, split: (make(), Records()))
    return task.read(task.rows(task.train, data_dir="nowhere")[0])


def test_counts():
    assert len(BY_NAME) == len(flan.TASKS)
    assert len({flan.set_of(task) for task in flan.TASKS}) == 62
    clusters = collections.Counter(cluster for _, cluster in {(flan.set_of(task), task.cluster) for task in flan.TASKS})
    assert clusters == {  # of figure 3
        "entailment": 7,
        "commonsense": 4,
        "sentiment": 4,
        "paraphrase": 4,
        "closed_book": 3,
        "struct_to_text": 4,
        "reading": 5,
        "reading_commonsense": 2,
        "coreference": 3,
        "miscellaneous": 7,
        "summarization": 11,
        "translation": 8,
    }


@all_tasks
def test_templates(task, monkeypatch):
    example = read(task, record(task), monkeypatch)
    assert isinstance(example, Example) and (not example.options or set(example.answers) <= set(example.options))
    assert (task.metric == "accuracy") == bool(example.options)
    assert 8 <= len(task.templates) <= 10 and sum(template.turned for template in task.templates) in (1, 2, 3)
    assert len({re.sub(r"\W", "", template.prompt.lower()) + template.target for template in task.templates}) == len(
        task.templates
    )
    for number, template in enumerate(task.templates):
        prompt, target = in_words(example, template, f"{task.name}, template {number}")
        assert prompt and target and not re.search(r"  |\{|\}|\.\.\Z|\n\n\n", prompt.replace("{language}", ""))
        if template.turned:  # a field is asked for, which the answer must help to find and nothing gives away
            assert re.fullmatch(r"\{\w+\}", template.target) and "{answer}" in template.prompt
            assert template.target not in template.prompt and "{options}" not in template.prompt
        else:
            assert "{answer}" not in template.prompt
            assert ("{options}" in template.prompt) == bool(example.options)
            assert not prompt.endswith(f"- {example.options[-1]}" if example.options else " ")  # a cue comes after


@all_tasks
def test_no_template_leaves_out_what_the_answer_depends_on(task, monkeypatch):
    example = read(task, record(task), monkeypatch)
    optional, used = OPTIONAL.get(task.name, set()), set()
    for path in set(re.findall(r"Some text, ([\w -]+), \d", str(record(task)))):
        changed = read(task, record(task, changed=path.replace(" ", "/")), monkeypatch)
        if (changed.fields, changed.options) == (example.fields, example.options):
            continue  # the reader has no use for it
        used.add(path)
        for template in task.templates:
            if not template.turned and path not in optional:
                assert in_words(changed, template)[0] != in_words(example, template)[0], (path, template)
    assert used and optional <= used


LABELS = {
    "anli-r1": {"e": "yes", "n": "maybe", "c": "no"},
    "cb": {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
    "mnli": {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
    "snli": {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
    "qnli": {"entailment": "yes", "not_entailment": "no"},
    "rte": {"entailment": "yes", "not_entailment": "no"},
    "wnli": {"entailment": "yes", "not_entailment": "no"},
    "multirc": {"True": "yes", "False": "no"},
    "wic": {"True": "yes", "False": "no"},
    "imdb": {"pos": "positive", "neg": "negative"},
    "sst2": {"positive": "positive", "negative": "negative"},
    "yelp": {"1": "negative", "2": "positive"},
    "mrpc": {"equivalent": "yes", "not_equivalent": "no"},
    "qqp": {"duplicate": "yes", "not_duplicate": "no"},
    "paws_wiki": {"different_meaning": "no", "paraphrase": "yes"},
    "cola": {"acceptable": "acceptable", "unacceptable": "unacceptable"},
    "ag_news": {
        "World": "world",
        "Sports": "sports",
        "Business": "business",
        "Sci/Tech": "science and technology",
    },
    "trec": {
        "DESC": "description",
        "ENTY": "entity",
        "ABBR": "abbreviation",
        "HUM": "person",
        "NUM": "number",
        "LOC": "place",
    },
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name, monkeypatch):
    task = BY_NAME[name]
    feature = "label-coarse" if name == "trec" else "label"
    assert set(builder(task.data).info.features[feature].names) == set(LABELS[name])
    for label, answer in LABELS[name].items():
        assert read(task, record(task, **{feature: label}), monkeypatch).answers == (answer,)
    assert read(task, record(task, **{feature: -1}), monkeypatch) is None  # of a split whose labels are kept secret


class Nowhere:
    """A download manager that pretends to have fetched everything."""

    manual_dir = epath.Path("nowhere")

    def download(self, urls):
        if isinstance(urls, dict):
            return {name: self.download(url) for name, url in urls.items()}
        return [self.download(url) for url in urls] if isinstance(urls, list | tuple) else epath.Path("nowhere")

    extract = download_and_extract = download

    def iter_archive(self, path):
        return iter(())


def test_splits(capsys):
    """Where a builder says its splits without the data and without TensorFlow, a task's are among them."""
    unsaid = set()
    for task in flan.TASKS:
        try:
            splits = builder(task.data)._split_generators(Nowhere())
        except (ModuleNotFoundError, AssertionError):  # TensorFlow; files that one must fetch by hand
            unsaid.add(task.name)
            continue
        names = {str(split) if isinstance(splits, dict) else str(split.name) for split in splits}
        assert {task.train.partition("[")[0], task.held_out.partition("[")[0]} <= names, task.name
        assert task.train != task.held_out
    assert len(unsaid) <= 6


def test_super_glue_needs_no_tensorflow(capsys):
    assert builder.__wrapped__("super_glue/wic").info.features["start1"].np_dtype == np.int32
    assert capsys.readouterr().out == ""  # where TFDS by itself asks for TensorFlow, in seven lines
    with pytest.raises(InputError, match="no_such_config"):
        builder("super_glue/no_such_config")


LITERAL = [
    (
        "copa",
        {
            "premise": "It rained.",
            "question": "effect",
            "choice1": "The sun rose.",
            "choice2": "I got wet.",
            "label": 1,
        },
        {"premise": "It rained.", "stem": "It rained", "link": "so", "asked": "effect"},
        ("I got wet.",),
        ("The sun rose.", "I got wet."),
    ),
    (
        "hellaswag",
        {
            "context": "[header] How to boil an egg [title] Heat water.",
            "endings": ["[step] Put the egg in.", "Eat the pan.", "Run.", "Sleep."],
            "activity_label": "Cooking",
            "label": 0,
        },
        {"context": "How to boil an egg Heat water.", "topic": "Cooking"},
        ("Put the egg in.",),
        ("Put the egg in.", "Eat the pan.", "Run.", "Sleep."),
    ),
    (
        "story_cloze",
        {"context": "Ann was ill. She rested.", "endings": ["She got well.", "She won."], "label": 2},
        {"story": "Ann was ill. She rested."},
        ("She won.",),
        ("She got well.", "She won."),
    ),
    ("sentiment140", {"text": "meh :(", "polarity": 0}, {"tweet": "meh :("}, ("negative",), ("negative", "positive")),
    (
        "stsb",
        {"sentence1": "A man runs.", "sentence2": "A man is running.", "label": 4.5},
        {"first": "A man runs.", "second": "A man is running."},
        ("5",),
        ("0", "1", "2", "3", "4", "5"),
    ),
    (
        "arc-easy",
        {
            "question": "What melts?",
            "choices": [{"label": "A", "text": "stone"}, {"label": "B", "text": "ice"}, {"label": "C", "text": "wood"}],
            "answerKey": "B",
        },
        {"question": "What melts?"},
        ("ice",),
        ("stone", "ice", "wood"),
    ),
    (
        "natural_questions",
        {"question": "who wrote emma", "answer": ["Jane Austen", "Austen"]},
        {"question": "who wrote emma?"},
        ("Jane Austen", "Austen"),
        (),
    ),
    (
        "trivia_qa",
        {
            "question": "Which city has the Tate?",
            "answer": {
                "value": "London",
                "aliases": ["London", "London, UK"],
                "normalized_aliases": ["london", "london uk"],
                "matched_wiki_entity_name": "",
                "normalized_matched_wiki_entity_name": "",
                "normalized_value": "london",
                "type": "WikipediaEntity",
            },
            "entity_pages": [],
            "search_results": [],
        },
        {"question": "Which city has the Tate?"},
        ("London", "London, UK", "london", "london uk"),
        (),
    ),
    (
        "boolq",
        {"passage": "Ice is frozen water.", "question": "is ice cold", "answer": True},
        {"passage": "Ice is frozen water.", "question": "is ice cold?"},
        ("yes",),
        ("no", "yes"),
    ),
    (
        "drop",
        {"passage": "2 goals, then 3.", "question": "How many?", "answer": "5", "validated_answers": ["5", "five"]},
        {"passage": "2 goals, then 3.", "question": "How many?"},
        ("5", "five"),
        (),
    ),
    (
        "multirc",
        {"paragraph": "Ann has a cat.", "question": "Who has one?", "answer": "Bob", "label": "False"},
        {"passage": "Ann has a cat.", "question": "Who has one?", "candidate": "Bob"},
        ("no",),
        ("no", "yes"),
    ),
    (
        "squad-v2",
        {"context": "Ann has a cat.", "question": "Who has a dog?", "answers": [], "plausible_answers": []},
        {"passage": "Ann has a cat.", "question": "Who has a dog?"},
        ("no answer",),
        (),
    ),
    (
        "record",
        {
            "passage": "Ann met Bob in Rome.\n@highlight\nThey talked\n@highlight\nIt was hot",
            "query": "The weather in @placeholder was fine.",
            "entities": ["Ann", "Bob", "Rome"],
            "answers": ["Rome"],
        },
        {
            "passage": "Ann met Bob in Rome.\n- They talked\n- It was hot",
            "query": "The weather in ___ was fine.",
        },
        ("Rome",),
        ("Ann", "Bob", "Rome"),
    ),
    (
        "wsc273",
        {
            "text": "They saw the dogs when they barked.",
            "pronoun_text": "they",
            "pronoun_start": 23,
            "pronoun_end": 27,
            "option1": "the people",
            "option2": "the dogs",
            "label": 1,
        },
        {"sentence": "They saw the dogs when *they* barked.", "pronoun": "they"},
        ("the dogs",),
        ("the people", "the dogs"),
    ),
    (
        "winogrande",
        {"sentence": "Ann called Bob, but _ was out.", "option1": "Ann", "option2": "Bob", "label": "2"},
        {"sentence": "Ann called Bob, but ___ was out."},
        ("Bob",),
        ("Ann", "Bob"),
    ),
    (
        "common_gen",
        {"concepts": ["dog", "run"], "target": "The dog runs.", "references": []},
        {"words": "dog, run"},
        ("The dog runs.",),
        (),
    ),
    (
        "dart",
        {
            "tripleset": ["[TABLECONTEXT] CITY Rome", "Rome COUNTRY Italy"],
            "target": "Rome is in Italy.",
            "references": ["Rome is in Italy.", "Italy has Rome."],
        },
        {"facts": "CITY Rome\nRome COUNTRY Italy"},
        ("Rome is in Italy.", "Italy has Rome."),
        (),
    ),
    (
        "e2e_nlg",
        {"meaning_representation": "name[The Eagle], eatType[pub]", "target": "The Eagle is a pub.", "references": []},
        {"data": "name: The Eagle, eatType: pub"},
        ("The Eagle is a pub.",),
        (),
    ),
    (
        "web_nlg",
        {"input": ['Aarhus_Airport | cityServed | "Aarhus, Denmark"'], "target": "It serves Aarhus.", "references": []},
        {"facts": "Aarhus Airport | cityServed | Aarhus, Denmark"},
        ("It serves Aarhus.",),
        (),
    ),
    (
        "opinion_idebate",
        {
            "_debate_name": "Ban cars",
            "_claim": "Cars are loud.",
            "_argument_sentences": [{"key": "0", "value": "They hoot."}, {"key": "1", "value": "They roar."}],
        },
        {"topic": "Ban cars", "arguments": "- They hoot.\n- They roar."},
        ("Cars are loud.",),
        (),
    ),
    (
        "coqa",
        {
            "story": "Ann has a black cat.",
            "questions": ["Who has a cat?", "What colour?"],
            "answers": [
                {"input_text": "Ann", "answer_start": 0, "answer_end": 3},
                {"input_text": "black", "answer_start": 10, "answer_end": 15},
            ],
        },
        {
            "story": "Ann has a black cat.",
            "conversation": "Q: Who has a cat?\nA: Ann\nQ: What colour?",
            "question": "What colour?",
        },
        ("black",),
        (),
    ),
    (
        "quac",
        {
            "context": "Ann sang until 1990. CANNOTANSWER",
            "question": "Why did she stop?",
            "title": "Ann",
            "section_title": "Career",
            "orig_answer": {"text": "CANNOTANSWER", "answer_start": 21},
            "answers": [{"text": "CANNOTANSWER", "answer_start": 21}, {"text": "until 1990", "answer_start": 9}],
        },
        {"title": "Ann", "section": "Career", "passage": "Ann sang until 1990.", "question": "Why did she stop?"},
        ("no answer", "until 1990"),
        (),
    ),
    (
        "math",
        {"question": "Solve 2*x + 4 = -2 for x.", "answer": "-3"},
        {"question": "Solve 2*x + 4 = -2 for x."},
        ("-3",),
        (),
    ),
    (
        "fix_punctuation",
        {"en": "Well, it's 5 o'clock - time for tea!", "da": "-"},
        {"bare": "Well its 5 oclock time for tea"},
        ("Well, it's 5 o'clock - time for tea!",),
        (),
    ),
    (
        "wmt16_en_de",
        {"en": "Good day.", "de": "Guten Tag."},
        {"english": "Good day.", "language": "German"},
        ("Guten Tag.",),
        (),
    ),
]


@pytest.mark.parametrize(("name", "values", "fields", "answers", "options"), LITERAL, ids=[row[0] for row in LITERAL])
def test_literal_rows(name, values, fields, answers, options, monkeypatch):
    task = BY_NAME[name]
    assert read(task, record(task, **values), monkeypatch) == Example(fields, answers, options)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sentiment140", {"polarity": 2}),  # neutral
        ("stsb", {"label": -1.0}),
        ("hellaswag", {"label": -1}),
        ("hellaswag", {"endings": ["So.", "So.", "Thus.", "Yes."]}),
        ("story_cloze", {"label": -1}),
        ("winogrande", {"label": -1}),
        ("record", {"answers": []}),
        ("natural_questions", {"answer": []}),
        ("common_gen", {"target": "", "references": []}),
        ("gigaword", {"summary": "UNK resigns"}),
        ("fix_punctuation", {"en": "No mark at all"}),
        ("coqa", {"questions": [], "answers": []}),
    ],
)
def test_records_of_no_use(name, values, monkeypatch):
    assert read(BY_NAME[name], record(BY_NAME[name], **values), monkeypatch) is None


def test_the_table_of_the_page():
    page = Path(__file__).parents[2] / "docs" / "tasks.md"
    assert flan.table() in page.read_text(), "put there what python -m rlhf_jax.data.tasks.flan prints"
