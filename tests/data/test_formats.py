"""Tests of rlhf_jax.data.formats: what becomes of rows as they are published, and of thousands that are broken."""

import gzip
import itertools
import json
import random
from collections import Counter

import pytest

from rlhf_jax.data import formats, json_lines, pipeline, sources
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.rows import check
from rlhf_jax.types import InputError

HH = {
    "chosen": "\n\nHuman: Any news?\n\nAssistant: Some. \n\nHuman: Good ones?\n\nAssistant: All: good.\n\nReally.",
    "rejected": "\n\nHuman: Any news?\n\nAssistant: Some. \n\nHuman: Good ones?\n\nAssistant: No.",
}
TLDR = {
    "info": {"id": "t3_0", "post": "I lost it.\nWhere?", "title": "My key", "subreddit": "lost"},
    "summaries": [
        {"text": " key lost", "policy": "ref", "note": None},
        {"text": "where is it", "policy": "ppo", "note": "n"},
    ],
    "choice": 1,
    "worker": "w",
    "extra": {"confidence": 8},
}
NEWS = TLDR | {
    "info": {"id": "0", "article": "A key was found.", "title": "Key", "site": "s", "post": None},
    "choice": 0,
}
WEBGPT = {
    "question": {"dataset": "d", "id": "0", "full_text": "Why is it so?"},
    "quotes_0": {"title": [], "extract": []},
    "answer_0": "Because [1].",
    "tokens_0": {"prefix": [1], "completion": [2]},
    "score_0": -0.5,
    "answer_1": "It is not.",
    "score_1": 0.5,
}
FINEGRAINED = {
    "question": "Who was it?",
    "passages": [["A page", "One was.", "Two were."], ["Another", "None was."]],
    "gold": "One.",
    **{f"prediction {k}": f"It was {k}." for k in (1, 2, 3, 4)},
    "feedback": {},
    "preference": [2, 0, 1, 1, 1, 1],
}
ALPACA = {"instruction": "Add them.", "input": "2, 3", "output": "5"}
DOLLY = {"instruction": "Greet me.", "context": "", "response": "Hello!", "category": "brainstorming"}
GSM8K = {"question": "What are 2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
P3 = {"inputs_pretokenized": "Is it so? ", "targets_pretokenized": "\nYes", "inputs": [1, 2], "targets": [3]}
ULTRAFEEDBACK = {
    "source": "s",
    "instruction": "Count to three.",
    "models": ["a", "b", "c", "d"],
    "completions": [
        {"response": text, "fine-grained_score": score, "overall_score": 1.0, "principle": "honesty"}
        for text, score in (("1 2 3", 4.75), ("123", 3.5), ("No.", 1.25), ("1, 2, 3", 4.75))
    ],
}
DIALOGUES = {
    "prompt": "Go on.",
    "chosen": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "I do."}],
    "rejected": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "I do not."}],
    "score_chosen": 8.5,
}
HELPSTEER = [
    {"prompt": "Hi<extra_id_1>Assistant\nHello<extra_id_1>User\nHow?", "response": text, "helpfulness": score}
    for text, score in (("So.", 1), ("Thus.", 3), ("Well.", 1))
]
HELPSTEER3 = {
    "domain": "general",
    "context": [{"role": "user", "content": "Who?"}],
    "response1": "He.",
    "response2": "She.",
    "overall_preference": 2,
}
REWARDBENCH = {"prompt": "Is it?", "chosen": "It is.", "rejected": "It is not.", "subset": "alpacaeval-easy", "id": 1}
NECTAR = {
    "prompt": "\n\nHuman: Any news?\n\nAssistant: ",
    "answers": [
        {"answer": f"News {k}.", "model": "m", "rank": float(rank)} for k, rank in enumerate((3, 1, 2, 7, 5, 4, 5))
    ],
    "turns": 1,
    "num_responses": 7,
}
SHAREGPT = {
    "id": "x_0",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello?"},
        {"from": "gpt", "value": "Hello."},
    ],
}
PRM800K = {
    "labeler": "l",
    "question": {"problem": "What are 2 and 3?", "ground_truth_answer": "5"},
    "label": {
        "steps": [
            {
                "completions": [{"text": "Add them.", "rating": 1}, {"text": "Wait.", "rating": 0}],
                "human_completion": None,
                "chosen_completion": 0,
            },
            {
                "completions": [{"text": "Why?", "rating": -1}],
                "human_completion": {"text": "2 + 3."},
                "chosen_completion": None,
            },
            {"completions": [{"text": "It is 6.", "rating": -1}], "human_completion": None, "chosen_completion": None},
        ],
        "finish_reason": "found_error",
    },
}
FIELDS = {"premise": "It rains.", "label": 1, "answer": "yes"}
TEMPLATES = [
    {"prompt": "{premise} So is it wet? {unclosed", "target": " {answer}"},
    {"prompt": "Wet? {premise}\n", "target": "{label}: {answer}"},
]
ROWS = {
    "hh": HH,
    "tldr": TLDR,
    "webgpt": WEBGPT,
    "finegrained": FINEGRAINED,
    "alpaca": ALPACA,
    "dolly": DOLLY,
    "gsm8k": GSM8K,
    "p3": P3,
    "ultrafeedback": ULTRAFEEDBACK,
    "helpsteer3": HELPSTEER3,
    "rewardbench": REWARDBENCH,
    "nectar": NECTAR,
    "sharegpt": SHAREGPT,
    "prm800k": PRM800K,
}


def user(content):
    return [{"role": "user", "content": content}]


def load(tmp_path, name, *rows, kind=None, suffix=".jsonl", templates=TEMPLATES):
    """What a file of these rows gives."""
    text = json.dumps(rows, indent=1) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    if name == "template":
        (tmp_path / "templates.json").write_text(json.dumps(templates))
        path = f"{tmp_path / 'templates.json'}:{path}"
    kind = kind or kind_of(name)
    return sources.rows(f"{name}:{path}", kind, data_dir=tmp_path / "store")


EXPECTED = [
    (
        "hh",
        HH,
        {
            "prompt": [*user("Any news?"), {"role": "assistant", "content": "Some."}, *user("Good ones?")],
            "responses": ["All: good.\n\nReally.", "No."],
            "ranks": [0, 1],
        },
    ),
    (
        "tldr",
        TLDR,
        {
            "prompt": "SUBREDDIT: r/lost\n\nTITLE: My key\n\nPOST: I lost it.\nWhere?\n\nTL;DR:",
            "responses": [" key lost", " where is it"],
            "ranks": [1, 0],
        },
    ),
    (
        "tldr",
        NEWS,
        {
            "prompt": "Article:\n\nA key was found.\n\nTL;DR:",
            "responses": [" key lost", " where is it"],
            "ranks": [0, 1],
        },
    ),
    (
        "webgpt",
        WEBGPT,
        {"prompt": user("Why is it so?"), "responses": ["Because [1].", "It is not."], "ranks": [1, 0]},
    ),
    (
        "webgpt",
        WEBGPT | {"score_0": 0, "score_1": 0.0},
        {"prompt": user("Why is it so?"), "responses": ["Because [1].", "It is not."], "ranks": [0, 0]},
    ),
    (
        "webgpt",
        [
            {"question": WEBGPT["question"], "answer": "Because.", "score": 0.25},
            {"question": WEBGPT["question"], "answer": "It is not.", "score": -0.25},
        ],
        {"prompt": user("Why is it so?"), "responses": ["Because.", "It is not."], "ranks": [0, 1]},
    ),
    (
        "finegrained",
        FINEGRAINED | {"preference": [2, 0, 1, 1, 1, 1]},  # 2 > 1 = 3 > 4
        {
            "prompt": user("A page\nOne was. Two were.\n\nAnother\nNone was.\n\nWho was it?"),
            "responses": ["It was 1.", "It was 2.", "It was 3.", "It was 4."],
            "ranks": [1, 0, 1, 2],
        },
    ),
    ("alpaca", ALPACA, {"prompt": user("Add them.\n\n2, 3"), "completion": "5"}),
    ("alpaca", ALPACA | {"input": ""}, {"prompt": user("Add them."), "completion": "5"}),
    ("dolly", DOLLY, {"prompt": user("Greet me."), "completion": "Hello!"}),
    ("dolly", DOLLY | {"context": "Me."}, {"prompt": user("Greet me.\n\nMe."), "completion": "Hello!"}),
    ("gsm8k", GSM8K, {"prompt": user("What are 2 and 3?"), "completion": "2+3=5\n#### 5"}),
    ("p3", P3, {"prompt": user("Is it so?"), "completion": "Yes"}),
    (
        "ultrafeedback",
        ULTRAFEEDBACK,
        {
            "prompt": user("Count to three."),
            "responses": ["1 2 3", "123", "No.", "1, 2, 3"],
            "ranks": [0, 1, 2, 0],
        },
    ),
    ("ultrafeedback", DIALOGUES, {"prompt": user("Go on."), "responses": ["I do.", "I do not."], "ranks": [0, 1]}),
    ("helpsteer3", HELPSTEER3, {"prompt": user("Who?"), "responses": ["He.", "She."], "ranks": [1, 0]}),
    ("rewardbench", REWARDBENCH, {"prompt": user("Is it?"), "responses": ["It is.", "It is not."], "ranks": [0, 1]}),
    (
        "rewardbench",
        REWARDBENCH | {"chosen": ["It is."], "rejected": ["No.", "Not it.", "It?"]},
        {"prompt": user("Is it?"), "responses": ["It is.", "No.", "Not it.", "It?"], "ranks": [0, 1, 1, 1]},
    ),
    (
        "nectar",
        NECTAR,
        {
            "prompt": user("Any news?"),
            "responses": [f"News {k}." for k in range(7)],
            "ranks": [2, 0, 1, 6, 4, 3, 4],
        },
    ),
    (
        "sharegpt",
        SHAREGPT,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                *user("Hello?"),
                {"role": "assistant", "content": "Hello."},
            ]
        },
    ),
    ("template", FIELDS, {"prompt": "It rains. So is it wet? {unclosed", "completion": " yes"}),
]


@pytest.mark.parametrize(("name", "row", "expected"), EXPECTED)
def test_a_row_as_it_is_published(tmp_path, name, row, expected):
    rows = load(tmp_path, name, row)
    assert list(rows) == [expected] and rows.counts == {}
    assert check(kind_of(name), rows[0], "row") == expected
    answer = {"answer": "5"} if name == "gsm8k" else {}
    prompt = expected["prompt"] if "prompt" in expected else expected["messages"][:-1]
    assert list(load(tmp_path, name, row, kind="prompts")) == [{"prompt": prompt, **answer}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ".json.gz"])
def test_files_as_they_are_published(tmp_path, suffix):
    rows = load(tmp_path, "alpaca", *[ALPACA | {"output": str(n)} for n in range(3)], suffix=suffix)
    assert [row["completion"] for row in rows] == ["0", "1", "2"]


def test_a_json_file_of_lines(tmp_path):
    (tmp_path / "batch3.json").write_text(f"{json.dumps(TLDR)}\n\n{json.dumps(NEWS)}\n")
    rows = sources.rows(f"tldr:{tmp_path}/batch3.json", "rankings", data_dir=tmp_path)
    assert [row["ranks"] for row in rows] == [[1, 0], [0, 1]]


def test_responses_to_one_prompt_stand_one_a_row(tmp_path, capsys):
    one = HELPSTEER[0] | {"prompt": "Alone?"}
    rows = load(tmp_path, "helpsteer", one, *HELPSTEER, HELPSTEER[0] | {"prompt": "Other?"}, HELPSTEER[1], HELPSTEER[0])
    prompt = [*user("Hi"), {"role": "assistant", "content": "Hello"}, *user("How?")]
    assert list(rows) == [
        {"prompt": prompt, "responses": ["So.", "Thus.", "Well."], "ranks": [1, 0, 1]},
        {"prompt": prompt, "responses": ["Thus.", "So."], "ranks": [0, 1]},
    ]
    assert rows.counts == {"rows refused, the only response to its prompt": 2} and rows.where(1).endswith("line 6")
    for broken, message in (
        (HELPSTEER[0] | {"helpfulness": "4"}, "line 2, field helpfulness: expected a number, got '4'"),
        (["no"], "line 2: expected a JSON object"),
    ):
        with pytest.raises(InputError, match=message):
            load(tmp_path, "helpsteer", HELPSTEER[0], broken)


def test_steps_along_the_path(tmp_path):
    rows = load(tmp_path, "prm800k", PRM800K)
    steps = {"steps": ["Add them.", "2 + 3.", "It is 6."], "labels": [1, 1, -1]}
    assert list(rows) == [{"prompt": user("What are 2 and 3?"), **steps}]
    assert rows.counts == {"rated steps left out, beside the path": 2}
    assert load(tmp_path, "prm800k", PRM800K, kind="prompts")[0] == {"prompt": user("What are 2 and 3?")}
    unrated = {"completions": [{"text": "Hm.", "rating": None}], "chosen_completion": 0}
    more = {"question": PRM800K["question"], "label": {"steps": [*PRM800K["label"]["steps"][:1], unrated]}}
    rows = load(tmp_path, "prm800k", more, more | {"label": {"steps": [unrated]}})
    assert [row["steps"] for row in rows] == [["Add them."]]
    assert rows.counts == {
        "rated steps left out, beside the path": 1,
        "solutions that end early, before a step without a rating": 2,
        "rows refused, no step has a rating": 1,
    }


def test_templates_take_turns(tmp_path):
    rows = load(tmp_path, "template", *[FIELDS | {"label": n} for n in range(3)])
    assert [row["completion"] for row in rows] == [" yes", "1: yes", " yes"]
    assert rows[1]["prompt"] == "Wet? It rains.\n"
    other = load(tmp_path, "template", FIELDS, templates=[{"prompt": "{premise}", "target": "{label}"}])
    assert list(other) == [{"prompt": "It rains.", "completion": "1"}]  # prepared anew


def dialogue(*said):
    return "".join(f"\n\n{speaker}: {text}" for speaker, text in zip(itertools.cycle(["Human", "Assistant"]), said))


REFUSED = [
    (
        "hh",
        {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "B", "c", "D")},
        "differ before the last",
    ),
    ("hh", {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "D")}, "differ before the last turn"),
    ("hh", {"chosen": dialogue("a", "b", "c"), "rejected": dialogue("a", "b", "d")}, "speakers do not take turns"),
    ("hh", HH | {"rejected": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c"}, "speakers do not take turns"),
    ("hh", HH | {"chosen": "\n\nAssistant: b"}, "speakers do not take turns"),
    ("hh", {"chosen": dialogue("a", "b"), "rejected": dialogue("a", " \n")}, "a response is empty"),
    ("hh", {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "b ")}, "the responses are the same"),
    ("tldr", TLDR | {"summaries": [{"text": "a"}, {"text": ""}]}, "a response is empty"),
    ("tldr", TLDR | {"summaries": [{"text": "a"}, {"text": " a"}]}, "the responses are the same"),
    ("webgpt", WEBGPT | {"answer_1": ""}, "a response is empty"),
    ("ultrafeedback", ULTRAFEEDBACK | {"completions": ULTRAFEEDBACK["completions"][:1]}, "fewer than two responses"),
    (
        "ultrafeedback",
        ULTRAFEEDBACK | {"completions": [{"response": "a", "overall_score": None}]},
        "a response has no score",
    ),
    (
        "ultrafeedback",
        DIALOGUES | {"rejected": [*user("Go off."), DIALOGUES["rejected"][1]]},
        "dialogues differ before the last turn",
    ),
    ("nectar", NECTAR | {"prompt": "\n\nHuman: a\n\nAssistant: b"}, "speakers do not take turns"),
    ("nectar", NECTAR | {"answers": []}, "fewer than two responses"),
    ("sharegpt", {"conversations": [{"from": "tool", "value": "5"}]}, "a tool speaks"),
    ("sharegpt", {"conversations": SHAREGPT["conversations"][:2]}, "the assistant does not end"),
    ("sharegpt", {"conversations": SHAREGPT["conversations"][2:]}, "the user does not begin"),
    ("finegrained", FINEGRAINED | {f"prediction {k}": "It." for k in (1, 2, 3, 4)}, "the responses are the same"),
]


@pytest.mark.parametrize(("name", "row", "why"), REFUSED)
def test_what_the_format_leaves_of_no_use_is_refused_and_counted(tmp_path, capsys, name, row, why):
    for _ in range(2):  # the second time from what is stored
        rows = load(tmp_path, name, ROWS[name], row, row)
        assert len(rows) == 1
        ((what, n),) = rows.counts.items()
        assert n == 2 and what.startswith("rows refused, ") and why in what
        assert capsys.readouterr().out == f"{tmp_path}/data.jsonl: 2 {what}\n"
    with pytest.raises(InputError, match=f"data.jsonl: expected rows of {kind_of(name)}, got 1 rows refused, .*{why}"):
        load(tmp_path, name, row)


def test_intransitive_labels_are_counted_and_ranked_by_wins_less_losses(tmp_path):
    labels = {
        (1, 1, 1, 1, 1, 1): ([0, 1, 2, 3], 0),
        (0, 0, 0, 0, 0, 0): ([0, 0, 0, 0], 0),
        (1, 2, 1, 1, 1, 1): ([0, 0, 0, 1], 1),  # 1 > 2 > 3 > 1, all before 4
        (1, 0, 0, 0, 0, 0): ([0, 2, 1, 1], 2),  # 1 > 2, but both equal to 3 and 4
        (1, 0, 1, 1, 1, 1): ([0, 1, 2, 3], 1),  # 1 > 2 > 3 = 1: scores 2, 1, 0, -3
    }
    for preference, (ranks, triples) in labels.items():
        rows = load(tmp_path, "finegrained", FINEGRAINED | {"preference": preference})
        assert rows[0]["ranks"] == ranks
        assert sum(n for what, n in rows.counts.items() if what.startswith("triples")) == triples
        assert sum(n for what, n in rows.counts.items() if what.startswith("rows")) == (triples > 0)


def test_labels_that_ranks_give_give_those_ranks():
    for ranks in itertools.product(range(4), repeat=4):
        preference = [0 if ranks[i] == ranks[j] else 1 + (ranks[i] > ranks[j]) for i, j in formats._PAIRS]
        counts = Counter()
        row = formats.finegrained(FINEGRAINED | {"preference": preference}, "row", counts)
        assert row["ranks"] == [sorted(set(ranks)).index(rank) for rank in ranks] and not counts


BAD = [
    ("hh", {"chosen": HH["chosen"]}, "field rejected: missing"),
    ("hh", HH | {"chosen": "Human: a\n\nAssistant: b"}, "field chosen: expected a dialogue that begins with"),
    ("hh", HH | {"chosen": "hello"}, "field chosen: expected a dialogue that begins with"),
    ("tldr", TLDR | {"info": 5}, "field info: expected a JSON object, got 5"),
    ("tldr", TLDR | {"info": {"title": "t", "subreddit": "s"}}, "field info, field post: missing"),
    ("tldr", TLDR | {"summaries": [{"text": "a"}]}, "field summaries: expected a list of 2"),
    ("tldr", TLDR | {"summaries": [{"text": "a"}, {"txt": "b"}]}, r"field summaries\[1\], field text: missing"),
    ("tldr", TLDR | {"choice": 2}, "field choice: expected 0 or 1, got 2"),
    ("tldr", TLDR | {"choice": True}, "field choice: expected 0 or 1, got True"),
    ("webgpt", WEBGPT | {"question": "Why?"}, "field question: expected a JSON object, got 'Why"),
    ("webgpt", WEBGPT | {"score_1": float("nan")}, "field score_1: expected a finite number, got nan"),
    ("webgpt", WEBGPT | {"score_0": "0.5"}, "field score_0: expected a number from -1 to 1, got '0.5'"),
    ("webgpt", [WEBGPT], "expected a list of 2"),
    ("webgpt", [WEBGPT, 5], r"line 2\[0\], field answer: missing"),
    ("finegrained", FINEGRAINED | {"preference": [1] * 5}, "field preference: expected a list of 6"),
    ("finegrained", FINEGRAINED | {"preference": [1] * 5 + [3]}, r"preference\[5\]: expected 0 or 1 or 2, got 3"),
    ("finegrained", FINEGRAINED | {"passages": [["t", 5]]}, r"field passages\[0\], field \[1\]: expected text, got 5"),
    ("finegrained", FINEGRAINED | {"prediction 3": None}, "field prediction 3: expected text, got None"),
    ("alpaca", DOLLY, "field input: missing"),
    ("ultrafeedback", {"instruction": "a"}, "field chosen: missing"),
    (
        "ultrafeedback",
        ULTRAFEEDBACK | {"completions": [{"response": "a", "overall_score": "N/A"}] * 2},
        r"field completions\[0\], field fine-grained_score: expected a number, got 'N/A'",
    ),
    (
        "helpsteer3",
        HELPSTEER3 | {"overall_preference": 4},
        "overall_preference: expected an integer from -3 to 3, got 4",
    ),
    ("helpsteer3", HELPSTEER3 | {"context": "Who?"}, "field context: expected a list of messages"),
    ("rewardbench", REWARDBENCH | {"chosen": []}, "field chosen: expected some text, got an empty list"),
    ("nectar", NECTAR | {"answers": [{"answer": "a", "rank": 1.5}]}, "field rank: expected a whole number from 1 up"),
    ("nectar", NECTAR | {"answers": [{"rank": 1}]}, r"field answers\[0\], field answer: missing"),
    ("sharegpt", {"conversations": [{"from": "parrot", "value": "a"}]}, "field from: expected one of human, user"),
    ("sharegpt", SHAREGPT | {"tools": [{"name": "f"}]}, "field tools: expected conversations without tools"),
    (
        "prm800k",
        PRM800K | {"label": {"steps": [{"chosen_completion": 3}]}},
        "chosen_completion: expected one of 0, got 3",
    ),
    (
        "prm800k",
        PRM800K | {"label": {"steps": [{"completions": [{"text": "a", "rating": 2}]}]}},
        r"field steps\[0\], field completions\[0\], field rating: expected -1, 0 or 1, got 2",
    ),
    ("dolly", ALPACA, "field context: missing"),
    ("gsm8k", GSM8K | {"answer": "5"}, "field answer: expected #### and a number"),
    ("p3", {"inputs": [1], "targets": [2]}, "field inputs_pretokenized: missing"),
    ("template", {"premise": "It rains.", "label": 0}, "field answer: missing"),
    ("template", FIELDS | {"premise": ["It rains."]}, "field premise: expected text, got"),
    ("template", [FIELDS], "expected a JSON object, got"),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD)
def test_a_row_of_another_format_is_named_and_nothing_is_prepared(tmp_path, name, row, message):
    good = FIELDS if name == "template" else ROWS[name]
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path, name, good, row)
    assert str(error.value).startswith(f"{tmp_path}/data.jsonl, line 2") and "\n" not in str(error.value)
    with pytest.raises(InputError, match=rf"^{tmp_path}/data.json, row 2.*{message.replace('line 2', '')}"):
        load(tmp_path, name, good, row, suffix=".json")
    assert not list((tmp_path / "store").rglob("*.array_record*"))


def test_unusable_files_and_specs(tmp_path):
    path = tmp_path / "data.json"
    for content, message in [
        ("", "expected rows of rankings, got an empty file"),
        ("[]", "expected rows of rankings, got an empty file"),
        ("[{},\n{}", "line 2: expected a list in JSON"),
        ("[" * 100_000, "expected a list in JSON"),
        ("[" + "9" * 5000 + "]", "expected a list in JSON"),
        ("{", "line 1: expected a JSON object"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            sources.rows(f"hh:{path}", "rankings", data_dir=tmp_path)
    for spec, message in [
        (f"hh:{tmp_path}/none.jsonl", "none.jsonl: no such file"),
        (f"template:{path}", "expected template:TEMPLATES:PATH"),
        (f"template:{tmp_path}/none.json:{path}", "none.json: no such file"),
        (f"p3:{path}", "p3 has demonstrations and prompts, no rankings"),
        ("hh:./train.pickle", "or a published format and a path, as in hh:PATH"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            sources.rows(spec, "rankings" if "template" not in spec else "prompts", data_dir=tmp_path)
        assert "\n" not in str(error.value)
    path.write_text("[]")
    with pytest.raises(InputError, match=r'expected templates, {"prompt", "target"}, got an empty file'):
        sources.rows(f"template:{path}:{path}", "prompts", data_dir=tmp_path)


# -- broken rows by the thousand ---------------------------------------------------------------------------------------

PLAIN = {
    "text": {"text": "t"},
    "demonstrations": {"prompt": "p", "completion": "c"},
    "rankings": {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [0, 2, 1]},
    "prompts": {"prompt": user("p")},
    "messages": {"messages": [*user("p"), {"role": "assistant", "content": "some words, and then some more " * 7}]},
}
# What every row needs, by where it stands.
NEEDED = {
    "hh": [("chosen",), ("rejected",)],
    "tldr": [("info",), ("info", "post"), ("info", "title"), ("info", "subreddit"), ("summaries",), ("summaries", 0),
             ("summaries", 1, "text"), ("choice",)],
    "webgpt": [("question",), ("question", "full_text"), ("answer_0",), ("answer_1",), ("score_0",), ("score_1",)],
    "finegrained": [("question",), ("passages",), ("passages", 1), ("passages", 0, 2), ("prediction 1",),
                    ("prediction 4",), ("preference",), ("preference", 3)],
    "alpaca": [("instruction",), ("input",), ("output",)],
    "dolly": [("instruction",), ("context",), ("response",)],
    "gsm8k": [("question",), ("answer",)],
    "p3": [("inputs_pretokenized",), ("targets_pretokenized",)],
    "template": [("premise",), ("answer",)],
    "text": [("text",)],
    "demonstrations": [("prompt",), ("completion",)],
    "rankings": [("prompt",), ("responses",), ("responses", 2), ("ranks",), ("ranks", 0)],
    "prompts": [("prompt",), ("prompt", 0), ("prompt", 0, "role"), ("prompt", 0, "content")],
    "messages": [("messages",), ("messages", 0), ("messages", 1, "role"), ("messages", 0, "content")],
}  # fmt: skip
# No field may be any of these.
JUNK = [
    None,
    True,
    -2,
    2**63,
    10**400,
    1e999,
    float("nan"),
    {},
    {"text": 5},
    {"": []},
    [[]],
    [None],
    [0.5] * 6,
    "\ud800",
]


def kind_of(name):
    if name in PLAIN and name != "messages":
        return name
    return "demonstrations" if name in ("template", "messages") else formats.kinds(name)[0]


def reader(name):
    """What reads one row of a format or, by `check`, of a kind."""
    if name in PLAIN:
        return lambda row, where, counts: check(kind_of(name), row, where)
    return formats.READERS[kind_of(name)][name]


@pytest.mark.parametrize("name", [name for name in NEEDED if name != "helpsteer"])
def test_broken_text(tmp_path, name):
    """Hundreds of files of each kind with characters changed, lost or doubled are read, counted, or refused."""
    rng = random.Random(name)
    kind = kind_of(name)
    path, row = tmp_path / "templates.json", FIELDS if name == "template" else (ROWS | PLAIN)[name]
    path.write_text(json.dumps(TEMPLATES))
    read = formats.templates(path) if name == "template" else reader(name)
    seen = Counter()
    for _ in range(300):
        text = bytearray(json.dumps(row).encode())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = rng.choice([b"", b'"', b"]", b"{", b",", b"\n", b"\xff", b"\\u", b"7"])
        path = path.with_name(rng.choice(["data.jsonl", "data.json"]))
        path.write_bytes(text)
        counts = Counter()
        try:
            if name in PLAIN:
                rows = [check(kind, value, where) for where, value in json_lines.json_values(path)]
            else:
                rows = [row for _, row in formats.read(kind, read, path, counts, json_lines.json_values(path))]
        except InputError as error:
            assert "\n" not in str(error) and str(error).startswith(str(path))
            seen["refused"] += 1
        else:
            assert all(check(kind, row, "row") == row for row in rows)
            refused = sum(n for what, n in counts.items() if what.startswith("rows refused"))
            assert len(rows) + refused == len(list(json_lines.json_values(path)))
            seen["read"] += 1
    assert seen["refused"] > 100 and seen["read"] > 0


# -- real files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_lib.train(["Is it so? It is."], 300, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("spec", "length", "kept", "refused", "intransitive"),
    [("hh:hh_harmless.jsonl.gz", 1024, 995, 5, 0), ("finegrained:finegrained_qa_k4.json", 8192, 300, 0, 13)],
)
def test_published_files(tmp_path, shared, tokenizer, spec, length, kept, refused, intransitive):
    name, _, file = spec.partition(":")
    if not (shared / "data" / file).exists():
        pytest.skip(f"needs ../shared/data/{file}")
    rows = sources.rows(f"{name}:{shared / 'data' / file}", "rankings", data_dir=tmp_path)
    assert len(rows) == kept
    assert sum(n for what, n in rows.counts.items() if "refused" in what) == refused
    assert sum(n for what, n in rows.counts.items() if what.startswith("rows with intransitive")) == intransitive
    data = pipeline.rankings(list(rows)[:100], tokenizer, length=length, batch=8, seed=0, epochs=1)
    assert data.counts.kept > 90 and data.counts.empty == 0
    assert next(iter(data)).rank.max() == (1 if name == "hh" else 3)
    assert (data.counts.truncated > 0) == (name == "hh")


# -- examples ----------------------------------------------------------------------------------------------------------

BBH = {"canary": "none", "examples": [{"input": "Is it?\nOptions:\n- Yes\n- No", "target": "No"},
                                      {"input": "Which?\nOptions:\n(A) 1\n(B) 2", "target": "(B)"},
                                      {"input": "How many?", "target": "3"},
                                      {"input": "not True is", "target": "False"}]}  # fmt: skip
BBH_PROMPT = """Not to be learnt from.
-----
Answer it.

Q: Is it so?
Options:
- Yes
- No
A: Let's think step by step.
It is. Then 1. So the answer is Yes.

Q: How much?
A: Let's think step by step.
Two lines.
Here. So the answer is 1.5.
"""


def examples(tmp_path, name, text, suffix, split="train"):
    path = tmp_path / f"data{suffix}"
    path.write_text(text)
    return sources.rows(f"{name}:{path}", "examples", data_dir=tmp_path / "store", split=split)


def test_chains_of_thought(tmp_path, capsys):
    lines = [
        "Is ice\\ncold?\\nOptions:\\n- yes\\n- no\tyes\tIt is frozen.",
        "Which?\\nOptions:\\n(A) ice\\n(B) tea\t(A)\tIt is cold.",
        'Which one?\\nOptions:\\n- Sentence A: "So."\\n- Sentence B: "Or: so."\\n\tSentence B\tOr.',
        "Why?\tSo\t",
        "Is it?\tno\t",
        "Which?\\nOptions:\\n- ice\\n- ice\tice\tTwice.",
        "Which?\\nOptions:\\n- ice\\n- tea\tcoffee\tNone.",
    ]
    rows = examples(tmp_path, "cot", "\n".join(lines), ".tsv")
    assert [(row["answers"], row["options"]) for row in rows] == [
        (["yes"], ["yes", "no"]),
        (["(A)"], ["(A)", "(B)"]),
        (["Sentence B"], ["Sentence A", "Sentence B"]),
        (["So"], []),
        (["no"], ["yes", "no"]),
    ]
    assert rows[0]["question"] == "Is ice\ncold?\nOptions:\n- yes\n- no" and rows[0]["rationale"] == "It is frozen."
    assert "1 rows refused, two options are the same; 1 rows refused, the answer is none" in capsys.readouterr().out
    with pytest.raises(InputError, match="line 1: expected question, answer and rationale between tabs, got"):
        examples(tmp_path, "cot", "Why?\tSo", ".tsv")
    with pytest.raises(InputError, match="cot has examples, no demonstrations"):
        sources.rows(f"cot:{tmp_path / 'data.tsv'}", "demonstrations", data_dir=tmp_path)


def test_sentiment(tmp_path):
    rows = examples(tmp_path, "sst", 'label,sentence\n0,"Dull, ""long"""\n1,Fine.\n', ".csv")
    assert [(row["question"], row["answers"]) for row in rows] == [
        ('Dull, "long"', ["negative"]),
        ("Fine.", ["positive"]),
    ]
    for text, message in [
        ("label,sentence\n2,Fine.\n", "line 2, field label: expected 0 or 1, got '2'"),
        ("label,text\n1,Fine.\n", "line 2, field sentence: missing"),
        ("label,sentence\n1,Fine.,so\n", "line 2: expected 2 fields"),
        ("label,sentence\n1\n", "line 2: expected 2 fields"),
        ('label,sentence\n1,"Fine\n', "expected a row of a table"),
    ]:
        with pytest.raises(InputError, match=message):
            examples(tmp_path, "sst", text, ".csv")


def test_gsm8k_as_examples(tmp_path):
    (row,) = examples(tmp_path, "gsm8k", json.dumps(GSM8K), ".jsonl")
    assert row == {"question": "What are 2 and 3?", "answers": ["5"], "options": [], "rationale": "2+3=5"}


def test_big_bench_hard_is_for_evaluation_alone(tmp_path):
    rows = examples(tmp_path, "bbh", json.dumps(BBH, indent=1), ".json", split="held_out")
    assert [(row["answers"], row["options"]) for row in rows] == [
        (["No"], ["Yes", "No"]),
        (["(B)"], ["(A)", "(B)"]),
        (["3"], []),
        (["False"], ["True", "False"]),
    ]
    spec = f"bbh:{tmp_path / 'data.json'}"
    for kind, split in [("examples", "train"), ("demonstrations", "train"), ("prompts", "held_out")]:
        with pytest.raises(InputError, match="BIG-Bench Hard is there to evaluate by alone: leave it out of training"):
            sources.rows(spec, kind, data_dir=tmp_path, split=split)
    with pytest.raises(InputError, match=r"data.cot.txt: no such file; .*prompt"):
        sources.rows(spec, "examples", data_dir=tmp_path, split="shots")
    (tmp_path / "data.cot.txt").write_text(BBH_PROMPT)
    first, second = sources.rows(spec, "examples", data_dir=tmp_path, split="shots")
    assert first == {"question": "Is it so?\nOptions:\n- Yes\n- No", "answers": ["Yes"], "options": ["Yes", "No"],
                     "rationale": "It is. Then 1."}  # fmt: skip
    assert second["answers"] == ["1.5"] and second["rationale"] == "Two lines.\nHere."
    assert formats.bbh_instruction(tmp_path / "data.json") == "Answer it."
    for text, message in [("[", "expected an object in JSON"), ('{"x": 1}', "field examples: missing")]:
        with pytest.raises(InputError, match=message):
            examples(tmp_path, "bbh", text, ".json", split="held_out")


@pytest.mark.slow
def test_published_examples(tmp_path, shared):
    """How many rows the files hold, and how many of them have options."""
    data = shared / "data"
    if not (data / "cot").exists():
        pytest.skip("needs ../shared/data/cot")
    found = {}
    for spec, split in [("cot:cot/creak.tsv", "train"), ("cot:cot/ecqa.tsv", "train"), ("sst:sst_dev.csv", "train"),
                        ("bbh:bbh/navigate.json", "held_out"), ("bbh:bbh/navigate.json", "shots")]:  # fmt: skip
        name, _, file = spec.partition(":")
        rows = list(sources.rows(f"{name}:{data / file}", "examples", data_dir=tmp_path, split=split))
        found[file, split] = len(rows), sum(bool(row["options"]) for row in rows)
    assert found == {
        ("cot/creak.tsv", "train"): (1500, 1500),
        ("cot/ecqa.tsv", "train"): (1488, 1488),
        ("sst_dev.csv", "train"): (872, 872),
        ("bbh/navigate.json", "held_out"): (250, 250),
        ("bbh/navigate.json", "shots"): (3, 3),
    }
