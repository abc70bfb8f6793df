"""EleutherAI's lm-evaluation-harness over any model directory, on any layout: its `LM` interface, without PyTorch.

Texts become tokens as the harness's own backend for `transformers` has it, with the tokenizer as the directory has it:
BOS where the tokenizer puts one and the text has none, the spaces between context and continuation with the
continuation, the tokenizer's BOS (or else EOS) in front of an empty context. Generation ends where one of the strings
of `until` appears, at the EOS of the model's settings, or at the tokenizer's.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import AutoTokenizer

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.devices import hosts, parallel
from rlhf_jax.rollouts import likelihood, rollout, sampling
from rlhf_jax.types import InputError, Prompts, named_key

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ModuleNotFoundError as error:
    TemplateLM, MISSING = object, str(error)
else:
    MISSING = ""

MOST = 256  # tokens of an answer whose task names no number, as in the harness
FIRST = 16  # tokens that are sampled before the first look for a string at which an answer ends; then twice as many
DRAWS = {"do_sample", "temperature", "top_k", "top_p"}  # settings of a task that say how tokens are drawn


class Harness(TemplateLM):
    """A language model as the harness asks it; `loglikelihood` is its own, and asks `_loglikelihood_tokens`."""

    def __init__(self, path: Path, model: models.Model, layout: parallel.Layout, batch: int, seed: int = 0):
        """`model` was loaded from `path`; `batch` rows are computed at a time over all devices.

        Raises InputError without the extra `eval`.
        """
        if MISSING:
            raise InputError(f"the harness needs the extra eval: pip install -e .[eval] ({MISSING})")
        super().__init__()
        models.tokenizer_of(model)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        self._path: Path = path
        self._model: models.Model = model
        self._layout: parallel.Layout = layout
        self._batch: int = batch
        self._key: Any = named_key(seed, "harness/sampling")
        self._read: likelihood.Reader = likelihood.Reader(model, layout, batch)
        self._params: Any = layout.state({"policy": model.params})
        self._bytes: list[bytes] = tokenizers.token_bytes(self.tokenizer)
        self._collector: Callable = functools.lru_cache(functools.partial(rollout.collector, model.config, layout))
        _warn_of_penalties(model)

    @property
    def max_length(self) -> int:
        return self._model.config.max_length

    @property
    def max_gen_toks(self) -> int:
        return MOST

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self._path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """The ids of a text; None puts in front of it what the tokenizer does, unless it begins with that already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        found = self._read([likelihood.Request(context, continuation) for _, context, continuation in requests])
        answers = [(one.total, one.greedy) for one in found]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, a window of the model's length after another."""
        windows: list[likelihood.Request] = []
        owners: list[int] = []
        for n, request in enumerate(requests):
            (text,) = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in rolling:
                windows.append(likelihood.Request(*utils.make_disjoint_window(window)))
                owners.append(n)
        totals = [0.0] * len(requests)
        for n, one in zip(owners, self._read(windows), strict=True):
            totals[n] += one.total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to the first of the strings that end it."""
        answers = [""] * len(requests)
        alike: dict[str, list[int]] = {}  # the numbers of the requests with the same settings
        for n, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(n)
        for numbers in alike.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], MOST)
            for n, text in zip(numbers, self._answers([requests[n].args[0] for n in numbers], settings), strict=True):
                answers[n] = text
                self.cache_hook.add_partial("generate_until", requests[n].args, text)
        return answers

    def _answers(self, contexts: Sequence[str], settings: Any) -> list[str]:
        """The answers to contexts under the same settings, each cut where it ends."""
        most = settings["max_gen_toks"]
        if unknown := settings.keys() - DRAWS - {"until", "max_gen_toks"}:
            raise InputError(
                f"generation_kwargs of a task has {', '.join(sorted(unknown))}: expected until, max_gen_toks,"
                f" {', '.join(sorted(DRAWS))}"
            )
        room = self.max_length - most
        if room < 1:
            raise InputError(f"max_gen_toks={most} leaves no room in the model's {self.max_length} tokens: lower it")
        until = handle_stop_sequences(settings["until"], eos=self.tokenizer.decode(self.eot_token_id))
        prompts = [self.tok_encode(context) for context in contexts]
        if cut := sum(len(prompt) > room for prompt in prompts):
            _warn(f"{cut} of {len(prompts)} contexts leave no room for {most} tokens and lose their oldest")
        prompts = [prompt[-room:] for prompt in prompts]
        ends = tokenizers.stop_ids(self.tokenizer, self._model.generation)
        stops = (*ends, *self._spelling(until, ends))
        draw = _draw(settings)
        answers: list[list[int]] = [[] for _ in prompts]
        going, done, step = list(range(len(prompts))), 0, FIRST
        while going:
            count = min(step, most - done)
            cfg = draw(max_new_tokens=count, eos_id=stops)
            sampled = self._sample([prompts[n] + answers[n] for n in going], np.array(going, np.uint32), cfg, done)
            for n, ids in zip(going, sampled, strict=True):
                answers[n] += ids
            done, step = done + count, 2 * step
            going = [] if done == most else [n for n in going if not self._ended(answers[n], until, ends)]
        return [postprocess_generated_text(self._text(ids), until, None) for ids in answers]

    def _sample(
        self, prompts: Sequence[list[int]], names: np.ndarray, cfg: sampling.Config, done: int
    ) -> list[list[int]]:
        """The next tokens after each of these; after those that end an answer there are none.

        What is drawn depends on a row's name, its number among all contexts, and on how many tokens are `done`.
        """
        sizes = np.array([len(prompt) for prompt in prompts])
        key = self._layout.state(jax.random.fold_in(self._key, done))
        step, left = self._collector(cfg), len(prompts)
        found: list[list[int]] = [[] for _ in prompts]
        for numbers, width in rollout.by_width(sizes, self.max_length - cfg.max_new_tokens, self._batch):
            tokens, mask = np.zeros((len(numbers), width), np.int32), np.zeros((len(numbers), width), bool)
            for row, n in enumerate(numbers):
                tokens[row, width - sizes[n] :], mask[row, width - sizes[n] :] = prompts[n], True
            rows = Prompts(tokens=tokens, mask=mask, index=numbers.astype(np.int32))
            first = self._layout.rows(hosts.share(names[numbers]))
            sampled = self._layout.gather(step(self._params, self._layout.rows(hosts.share(rows)), key, first))
            for row, n in enumerate(numbers[:left]):
                found[n] = sampled.tokens[row, width:][sampled.response_mask[row]].tolist()
            left -= len(numbers)
        return found

    def _spelling(self, until: Sequence[str], ends: Sequence[int]) -> tuple[int, ...]:
        """The ids that spell a string of `until` whole, so that nothing behind them is kept."""
        wanted = [text.encode() for text in until if text]
        return tuple(i for i, text in enumerate(self._bytes) if i not in ends and any(part in text for part in wanted))

    def _ended(self, ids: Sequence[int], until: Iterable[str], ends: Sequence[int]) -> bool:
        return ids[-1] in ends or any(text and text in self._text(ids) for text in until)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _draw(settings: Any) -> Callable[..., sampling.Config]:
    """How a task says that tokens are drawn."""
    if not settings["do_sample"]:
        return functools.partial(sampling.Config, temperature=0.0)
    return functools.partial(
        sampling.Config,
        temperature=float(settings.get("temperature") or 1.0),
        top_k=int(settings.get("top_k", 0)),
        top_p=float(settings.get("top_p", 1.0)),
    )


def _warn_of_penalties(model: models.Model) -> None:
    """Say so where the model's settings ask for a penalty, which `transformers` heeds in greedy generation too."""
    penalty = (model.generation or {}).get("repetition_penalty", 1.0)
    if penalty != 1.0:
        _warn(f"repetition_penalty={penalty} of generation_config.json is left out: answers are the model's own")


def _warn(text: str) -> None:
    if hosts.first():
        print(f"warning: {text}", file=sys.stderr)


def evaluate(
    model: TemplateLM,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    seed: int = 0,
) -> dict:
    """The harness's results of tasks, by name or file, which `model` answers: "results", "samples" and so on.

    Raises InputError for a task that there is not, or whose file or data cannot be read.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    for name in tasks:
        if not name.endswith((".yaml", ".yml")) and not manager.match_tasks([name]):
            where = "in that folder or with" if include else "with"
            raise InputError(f"--tasks {name}: no such task comes {where} lm-evaluation-harness; a file ends in .yaml")
    try:
        manager.load(list(tasks))
    except Exception as error:  # of the harness, of YAML and of `datasets`, without a common kind
        text = " ".join(str(error).split())
        raise InputError(f"--tasks {' '.join(tasks)}: {type(error).__name__}: {text}"[:400]) from error
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=chat,
        fewshot_random_seed=seed,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=None,
        bootstrap_iters=1000,
    )
    assert found is not None, "the harness returns None on other processes of its own, of which there are none"
    return found


def table(results: dict) -> str:
    """The metrics of each task with their standard errors, in Markdown."""
    from lm_eval.utils import make_table

    return make_table(results)
