"""Talks with a model in a terminal, in the words of its chat template.

    python scripts/chat.py --model runs/quickstart/ppo/model

Answers appear as they are sampled. /reset forgets the conversation, /quit and control-D leave, control-C stops an
answer. A turn reads only what is new: what was read and said before stays in the attention cache. Once the conversation
outgrows the model's context, its oldest turns are left out, and a note says so; the rest is then read again. Standard
input may also be a file or a pipe with a message a line; answers go to standard output, notes to standard error.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import jax

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import sampling
from rlhf_jax.rollouts.conversations import Conversations
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count, NonNegative, Seed, Settings, Share, Whole
from rlhf_jax.types import InputError, named_key


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    model: Path = Path("runs/quickstart/ppo/model")  # model directory
    dtype: Literal["float32", "bfloat16"] = "float32"  # of its parameters and of what is computed
    system: str | None = None  # system message that precedes every conversation
    temperature: NonNegative = 0.7  # 0 is greedy
    top_k: Whole = 0  # sample among the k likeliest tokens; 0: among all
    top_p: Share = 1.0  # sample among the likeliest tokens that have this probability together
    max_new_tokens: Count = 256  # of an answer; at most half of the model's context is used for it
    seed: Seed = 0  # of sampling
    device: Literal["cpu", "gpu", "tpu"] | None = None  # None is the best there is
    devices: parallel.Config = parallel.Config()  # without a mesh, the first device of its kind is used

    def __post_init__(self) -> None:
        super().__post_init__()
        useless = {"data": self.devices.data not in (None, 1), "offload": self.devices.offload}
        useless["microbatches"] = self.devices.microbatches > 1
        for name in (name for name, given in useless.items() if given):
            raise InputError(f"devices.{name} does nothing for one conversation: leave it out, and use fsdp or tensor")


def main(cfg: Config) -> None:
    layout = mesh(cfg)
    place = (lambda path, shape: None) if layout is None else layout.sharding
    model = models.load(cfg.model, cfg.dtype, models.Compute(cfg.dtype), place)
    tokenizer = models.tokenizer_of(model)
    stops, context = models.stop_ids(model), model.config.max_length
    room = min(cfg.max_new_tokens, context // 2)
    sampled = sampling.Config(
        max_new_tokens=room,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        eos_id=stops,
    )
    talk = Conversations(model, model.params, sampled, layout=layout)
    key = named_key(cfg.seed, "chat")
    system = [] if cfg.system is None else [{"role": "system", "content": cfg.system}]
    turns: list[tokenizer_lib.Message] = []  # of user and assistant alternately
    for number, line in enumerate(lines()):
        if line == "/reset":
            turns = []
            continue
        asked = [*turns, {"role": "user", "content": line}]
        first, prompt = fit(tokenizer, system, asked, context - room)
        if first == len(asked):
            note(f"too long: the prompt has {len(prompt)} tokens, and {context - room} leave room for an answer")
            continue
        if first:
            note(f"the context of {context} tokens is full: oldest turns dropped: {first // 2}")
        tokens = talk.stream("terminal", prompt, jax.random.fold_in(key, number))
        answer = say(tokenizer, (i for i in tokens if i not in stops))
        turns = [*asked[first:], {"role": "assistant", "content": answer}]


def mesh(cfg: Config) -> parallel.Mesh | None:
    """The mesh over as many devices of the chosen kind as the flags ask for; None for a single device.

    Raises InputError where there are too few.
    """
    if cfg.device is not None:  # before jax looks for devices
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(cfg.device, cfg.device))
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise InputError(f"device={cfg.device}: jax finds none ({str(error).splitlines()[0]})") from error
    if cfg.device not in (None, devices[0].platform):
        raise InputError(f"device={cfg.device}: jax already computes on {devices[0].platform}; leave it out")
    layout = parallel.layout(cfg.devices, devices[: cfg.devices.fsdp * cfg.devices.tensor])
    return layout if isinstance(layout, parallel.Mesh) else None


def lines() -> Iterator[str]:
    """The lines that the user enters, up to /quit or the end; empty ones are left out."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit and recall lines
        note("/reset forgets the conversation, /quit leaves, control-C stops an answer")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line


def fit(
    tokenizer: tokenizer_lib.Tokenizer,
    system: list[tokenizer_lib.Message],
    turns: list[tokenizer_lib.Message],
    length: int,
) -> tuple[int, list[int]]:
    """The first turn from which on the prompt has at most `length` tokens, and that prompt.

    Where even the last turn alone is too long, the number of turns, and the prompt of that one.
    """
    prompt: list[int] = []
    for first in range(0, len(turns), 2):
        prompt = tokenizer_lib.render_prompt(tokenizer, [*system, *turns[first:]])
        if len(prompt) <= length:
            return first, prompt
    return len(turns), prompt


def say(tokenizer: tokenizer_lib.Tokenizer, tokens: Iterable[int]) -> str:
    """Print the text of tokens as they come, up to control-C, and return it.

    White space at the end waits for what follows it, and so do the first bytes of a character for its last.
    """
    ids: list[int] = []
    printed = ""
    with contextlib.suppress(KeyboardInterrupt):
        for i in tokens:
            ids.append(i)
            text = tokenizer_lib.decode(tokenizer, ids).rstrip("\N{REPLACEMENT CHARACTER}").strip()
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print()
    return printed


def note(text: str) -> None:
    print(f"({text})", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, Config())
