"""The questions to people: the tasks, what an answer to each must hold, and the row that training reads from it.

    task          asked of the prompt and its K responses                       an answer holds
    rank          rate each response, then order all, ties allowed              "ranks": [K], "ratings": [K]
    compare       which of two is better, and by how much                       "strength": from -4 to 4
    best          which of K is best                                            "best": a response
    arena         which of two models' answers is better                        "verdict": first, second, tie or bad
    demonstrate   write a response, or edit one of those given                  "text", perhaps "edited": a response
    chat          talk: two answers a turn, the chosen one continues            its turns, each of which is a comparison
    thumb         whether one response is good                                  "thumb": "up" or "down"

Every answer may also hold "prompt_flags", "confidence" (1-9) and "note". Instead of an answer a person may skip the
task, with a reason. A page shows the responses in an order of its own; `restored` undoes that order before anything is
stored. A rating is {"overall", "helpful", "honest", "harmless": 1-7, "flags": names}, after InstructGPT
(arXiv:2203.02155, appendix B); the strength is that of Anthropic HH (arXiv:2204.05862), with 0 for a tie.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from rlhf_jax.errors import InputError

Task = Literal["rank", "compare", "best", "demonstrate", "arena", "chat", "thumb"]
Ratings = Literal["all", "overall", "none"]
TASKS: tuple[Task, ...] = get_args(Task)
VERDICTS = ("first", "second", "tie", "bad")  # of an arena; bad: neither answer will do, which is a tie otherwise
THUMBS = ("up", "down")
SCALES = ("overall", "helpful", "honest", "harmless")
FLAGS = (
    "fails_instruction",
    "inappropriate_for_assistant",
    "hallucination",
    "satisfies_constraint",
    "sexual",
    "violent",
    "encourages_harm",
    "denigrates_protected_class",
    "harmful_advice",
    "opinion",
    "moral_judgement",
)
PROMPT_FLAGS = ("ambiguous", "sensitive", "needs_constraint", "asks_opinion", "unclear_intent")
SKIPS = ("unclear", "not_qualified", "upsetting", "broken", "other")
STRONGEST = 4  # strength of a comparison: -4 the first is far better, 0 a tie, 4 the second is
LONGEST = 100_000  # characters of a text that a person writes
_LONGEST_NOTE = 5_000


class Contradiction(InputError):
    """Ratings and ranking of an answer disagree, and the person has not been asked about it yet.

    `pairs` has the responses (as shown) of which the first is rated higher and ranked lower.
    """

    def __init__(self, pairs: list[tuple[int, int]]):
        super().__init__(f"{len(pairs)} pairs of responses are rated one way and ranked the other: confirm or change")
        self.pairs = pairs


def checked(task: str, count: int, answer: Any, ratings: Ratings) -> dict[str, Any]:
    """The answer to a task on `count` responses, with its known fields alone; InputError for one that is wrong.

    `ratings` says which ratings each response of a ranking needs.
    """
    answer = _fields(answer)
    if "skip" in answer:
        if answer["skip"] not in SKIPS:
            raise InputError(f"skip: expected one of {', '.join(SKIPS)}")
        return {"skip": answer["skip"], **_common(answer)}
    match task:
        case "rank":
            ranks = _ranks(answer.get("ranks"), count)
            rated = _ratings(answer.get("ratings"), count, ratings)
            pairs = list(contradictions(ranks, rated))
            if pairs and answer.get("confirmed") is not True:
                raise Contradiction(pairs)
            return {"ranks": ranks, "ratings": rated, "confirmed": bool(pairs), **_common(answer)}
        case "compare":
            return {"strength": _whole(answer, "strength", -STRONGEST, STRONGEST), **_common(answer)}
        case "best":
            return {"best": _whole(answer, "best", 0, count - 1), **_common(answer)}
        case "demonstrate":
            written = text(answer.get("text"), "text", LONGEST)
            if not written.strip():
                raise InputError("text: expected an answer, got nothing")
            edited = None if answer.get("edited") is None else _whole(answer, "edited", 0, count - 1)
            return {"text": written, "edited": edited, **_common(answer)}
        case "arena":
            if answer.get("verdict") not in VERDICTS:
                raise InputError(f"verdict: expected one of {', '.join(VERDICTS)}")
            return {"verdict": answer["verdict"], **_common(answer)}
        case "chat":
            return _common(answer)
        case "thumb":
            if answer.get("thumb") not in THUMBS:
                raise InputError(f"thumb: expected one of {', '.join(THUMBS)}")
            return {"thumb": answer["thumb"], **_common(answer)}
    raise InputError(f"task {task}: expected one of {', '.join(TASKS)}")


def contradictions(ranks: Sequence[int], ratings: Sequence[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """Pairs of responses of which the first has the higher overall rating and the worse rank."""
    for i, j in itertools.permutations(range(len(ranks)), 2):
        ours, theirs = ratings[i].get("overall"), ratings[j].get("overall")
        if ours is not None and theirs is not None and ours > theirs and ranks[i] > ranks[j]:
            yield i, j


def restored(answer: dict[str, Any], shown: Sequence[int]) -> dict[str, Any]:
    """A checked answer in the order of the item, where `shown[n]` is the response that stood in place n."""
    answer = dict(answer)
    for name in ("ranks", "ratings"):
        if name in answer:
            listed = dict(zip(shown, answer[name], strict=True))
            answer[name] = [listed[k] for k in range(len(shown))]
    for name in ("best", "edited"):
        if answer.get(name) is not None:
            answer[name] = shown[answer[name]]
    if "strength" in answer and list(shown) == [1, 0]:
        answer["strength"] = -answer["strength"]
    if answer.get("verdict") in VERDICTS[:2]:
        answer["verdict"] = VERDICTS[shown[VERDICTS.index(answer["verdict"])]]
    return answer


def displayed(answer: dict[str, Any], shown: Sequence[int]) -> dict[str, Any]:
    """An answer in the order of the item as it was given on a page: the inverse of `restored`."""
    return restored(answer, [list(shown).index(k) for k in range(len(shown))])


def ranks_of(task: str, answer: dict[str, Any], count: int) -> list[int] | None:
    """The ranks of the responses that an answer implies, 0 for the best; None where it orders none."""
    if "ranks" in answer:
        return answer["ranks"]
    if task == "compare" and "strength" in answer:
        return [int(answer["strength"] > 0), int(answer["strength"] < 0)]
    if task == "arena" and "verdict" in answer:
        return [int(answer["verdict"] == "second"), int(answer["verdict"] == "first")]
    if task == "best" and "best" in answer:
        return [int(k != answer["best"]) for k in range(count)]
    return None


def rows(task: str, prompt: Any, responses: list[str], answer: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows that training reads from an answer, each after its kind: "rankings", "demonstrations" or "thumbs".

    An edited response also is a ranking: what was written, then the one that was edited, then all others, tied. A
    conversation is read as the comparisons of its turns; as a whole it is one of "dialogues".
    """
    ranks = ranks_of(task, answer, len(responses))
    if task == "compare" and ranks is not None and ranks[0] != ranks[1]:
        chosen, rejected = (responses[ranks.index(rank)] for rank in (0, 1))
        yield "rankings", {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    elif ranks is not None:
        yield "rankings", {"prompt": prompt, "responses": responses, "ranks": ranks}
    elif "text" in answer:
        yield "demonstrations", {"prompt": prompt, "completion": answer["text"]}
        edited = answer["edited"]
        if edited is not None and answer["text"] != responses[edited]:
            others = [response for k, response in enumerate(responses) if k != edited]
            ordered = [answer["text"], responses[edited], *others]
            yield "rankings", {"prompt": prompt, "responses": ordered, "ranks": [0, 1] + [2] * len(others)}
    elif "thumb" in answer:
        yield "thumbs", {"prompt": prompt, "response": responses[0], "label": answer["thumb"] == "up"}
    elif "messages" in answer:
        yield "dialogues", {"topic": prompt, "messages": answer["messages"]}


# -- checks ------------------------------------------------------------------------------------------------------------


def _fields(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise InputError("answer: expected an object")
    return answer


def _ranks(ranks: Any, count: int) -> list[int]:
    """Ranks without gaps; every response must have been placed."""
    if not isinstance(ranks, list) or len(ranks) != count:
        raise InputError(f"ranks: expected {count}, one per response")
    if any(rank is None for rank in ranks):
        raise InputError("ranks: every response needs a place; one was never placed")
    if not all(type(rank) is int and 0 <= rank < count for rank in ranks):
        raise InputError(f"ranks: expected whole numbers from 0 to {count - 1}")
    levels = sorted(set(ranks))
    return [levels.index(rank) for rank in ranks]


def _ratings(ratings: Any, count: int, needed: Ratings) -> list[dict[str, Any]]:
    if ratings is None and needed == "none":
        return [{} for _ in range(count)]
    if not isinstance(ratings, list) or len(ratings) != count:
        raise InputError(f"ratings: expected {count}, one per response")
    scales = {"all": SCALES, "overall": SCALES[:1], "none": ()}[needed]
    return [_rating(rating, f"ratings[{k}]", scales) for k, rating in enumerate(ratings)]


def _rating(rating: Any, where: str, needed: Sequence[str]) -> dict[str, Any]:
    if not isinstance(rating, dict):
        raise InputError(f"{where}: expected an object")
    given = {name: rating[name] for name in SCALES if rating.get(name) is not None}
    for name in needed:
        if name not in given:
            raise InputError(f"{where}: expected a rating of {name}, got none")
    for name, value in given.items():
        if type(value) is not int or not 1 <= value <= 7:
            raise InputError(f"{where}.{name}: expected a whole number from 1 to 7")
    flags = _names(rating.get("flags"), FLAGS, f"{where}.flags")
    return given | ({"flags": flags} if flags else {})


def _names(given: Any, known: Sequence[str], where: str) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(name in known for name in given):
        raise InputError(f"{where}: expected names among {', '.join(known)}")
    return [name for name in known if name in given]


def _whole(answer: dict[str, Any], name: str, least: int, most: int) -> int:
    value = answer.get(name)
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name}: expected a whole number from {least} to {most}")
    return value


def text(value: Any, name: str, longest: int | None = None) -> str:
    """The value, if it is a text that can be stored; InputError, with its name, if it is not, or is too long."""
    if not isinstance(value, str):
        raise InputError(f"{name}: expected text, got {str(value)[:60]}")
    if longest is not None and len(value) > longest:
        raise InputError(f"{name}: expected at most {longest} characters, got {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name}: expected Unicode text, got half of a surrogate pair") from None
    return value


def _common(answer: dict[str, Any]) -> dict[str, Any]:
    """The fields that an answer to any task may hold, without those left empty."""
    found = dict[str, Any]()
    if flags := _names(answer.get("prompt_flags"), PROMPT_FLAGS, "prompt_flags"):
        found["prompt_flags"] = flags
    if answer.get("confidence") is not None:
        found["confidence"] = _whole(answer, "confidence", 1, 9)
    if note := text(answer.get("note") or "", "note", _LONGEST_NOTE).strip():
        found["note"] = note
    return found
