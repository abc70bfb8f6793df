"""What the studies share: one fine-tuned model, the labels of each seed, and going on where they were stopped.

A study is several experiments at several seeds. A seed is that of the labels, of the reward model and of the policy;
the fine-tuned model is the same for all. Studies with the same `out` share what they have in common, and a command that
is run again makes only what is missing.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from experiments import ppo, pretrain, rank, reward, sft
from rlhf_jax import models, runs
from rlhf_jax.algorithms import best_of_n
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data.tokenizer import prompt_text
from rlhf_jax.data.world import World
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import rollout, scores
from rlhf_jax.runs import cli, log
from rlhf_jax.types import InputError, Rollout, check_positive, named_key

BATCH = 256  # answers sampled or scored at once, over all devices
BEGIN, END = "<!-- made by the study: begin -->", "<!-- end -->"
WORLD = World.generate(0)

C = TypeVar("C", bound="Config")
T = TypeVar("T")
Result = TypeVar("Result")
Point = dict[str, float]  # kl (nats a response), gold (0 to 1), and proxy, the reward model's score, if there is one


# The types of the stages are quoted: by the time they were evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes with which four seeds of every study take two CPU cores less than an hour."""

    out: Path = Path("runs/studies")  # run directory, shared by the studies
    docs: Path | None = Path("docs")  # folder of the pages whose tables and plots are renewed; None for none
    seeds: int = 4  # of labels, reward model and policy
    jobs: int = 1  # seeds at a time, each in a process of its own: for CPUs, where models so small leave cores idle
    prompts: int = 1600  # prompts whose answers are ranked, a seed
    compute: models.Compute = models.Compute()  # of every stage
    devices: parallel.Config = parallel.Config()  # likewise
    pretrain: "pretrain.Config" = pretrain.Config()
    sft: "sft.Config" = sft.Config()
    rank: "rank.Config" = rank.Config(held_out=96)
    reward: "reward.Config" = reward.Config()
    ppo: "ppo.Config" = ppo.Config()

    def __post_init__(self) -> None:
        check_positive(self, "seeds", "jobs", "prompts")


def shared(cfg: Config) -> dict[str, Any]:
    """The settings that every stage takes from the study."""
    return {"data_dir": cfg.out / "data", "compute": cfg.compute, "devices": cfg.devices}


def together(cfg: C, of: Callable[[C, T], Result], items: Iterable[T]) -> list[Result]:
    """`of(cfg, item)` of each, `cfg.jobs` at a time. Where one fails or is interrupted, all are."""
    if cfg.jobs == 1:
        return [of(cfg, item) for item in items]
    spawn = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(cfg.jobs, spawn, cli.prepare) as pool:
        try:
            return list(pool.map(functools.partial(of, cfg), items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def tuned(cfg: Config, preset: str | None = None) -> Path:
    """Model directory of a fine-tuned model of this size, by default the policy's."""
    preset = preset or cfg.pretrain.preset
    out = cfg.out / preset
    sized = dataclasses.replace(cfg.pretrain, preset=preset)
    runs.once(pretrain.main, cli.hand_down("pretrain", sized, out=out / "pretrain", **shared(cfg)))
    fine = cli.hand_down("sft", cfg.sft, init=out / "pretrain" / "model", out=out / "sft", **shared(cfg))
    runs.once(sft.main, fine)
    return fine.out / "model"


def judge(cfg: Config, seed: int, prompts: int | None = None, epochs: int = 1, preset: str | None = None) -> dict:
    """The reward model that starts from `tuned(cfg, preset)`: its `model` directory, and held-out `accuracy`.

    It learns from the labels on the first `prompts` prompts, by default all.
    """
    prompts, home = prompts or cfg.prompts, cfg.out / f"seed{seed}"
    given: dict[str, Any] = {"init": tuned(cfg), "prompts": cfg.prompts, "seed": seed, **shared(cfg)}
    ranked = cli.hand_down("rank", cfg.rank, out=home / "rank", **given, **sampling(cfg.ppo))
    runs.once(rank.main, ranked)
    with (ranked.out / "train.jsonl").open() as rows:
        runs.write(labels(cfg, seed, prompts), "".join(itertools.islice(rows, prompts)))
    data = {"data": str(labels(cfg, seed, prompts)), "held_out": str(ranked.out / "held_out.jsonl")}
    out = home / f"reward-{preset or cfg.pretrain.preset}-{prompts}"
    given = {"init": tuned(cfg, preset), "epochs": epochs, "seed": seed, **shared(cfg)}
    learnt = cli.hand_down("reward", cfg.reward, out=out, **given, **data)
    return {"model": learnt.out / "model", **runs.once(reward.main, learnt)}


def labels(cfg: Config, seed: int, prompts: int) -> Path:
    """File of the rankings of the first prompts, which `judge` writes."""
    return cfg.out / f"seed{seed}" / "rank" / f"first{prompts}.jsonl"


def policy(cfg: Config, seed: int, judge: Path) -> dict[str, Any]:
    """The settings that the study decides for a policy that learns from a reward model."""
    return {"init": tuned(cfg), "reward": (judge,), "seed": seed, **shared(cfg)}


def sampling(run: ppo.Config) -> dict[str, Any]:
    """The settings of PPO by which every answer is sampled."""
    return {
        "temperature": run.ppo.temperature,
        "prompt_length": run.prompt_length,
        "max_new_tokens": run.max_new_tokens,
    }


def gold(prompt: str, response: str) -> float:
    return WORLD.gold(prompt, response).score


def course(run: Path, points: int = 10) -> list[Point]:
    """Means over the samples of a run, in order, in as many windows of steps."""
    tables: dict[int, list[dict]] = {}
    for row in log.read(run, "samples.jsonl"):
        tables.setdefault(row["step"], []).append(row)
    windows = np.array_split(np.array(sorted(tables)), min(points, len(tables)))
    rows = [[row for step in window for row in tables[step]] for window in windows]
    return [
        {
            "kl": float(np.mean([row["kl"] for row in window])),
            "gold": float(np.mean([gold(row["prompt"], row["response"]) for row in window])),
            "proxy": float(np.mean([row["score"] for row in window])),
        }
        for window in rows
    ]


def answers(run: ppo.Config, model: Path, prompts: int, times: int = 1) -> tuple[Rollout, np.ndarray]:
    """Answers of a model to prompts of `run.data`, each asked so many times in turn, and gold of each answer [B].

    The prompts lie evenly in those that policies train on. `run` says how answers are sampled, what reward models score
    them, and by `init` what the KL is measured from.
    """
    layout = parallel.layout(run.devices)
    said, worth = _said(dataclasses.replace(run, reward=(), critic="policy", out=Path()), model, prompts, times)
    rewards = [models.load_reward(path, compute=run.compute, place=layout.sharding) for path in run.reward]
    score = scores.reward_models(rewards, models.tokenizer_of(rewards[0]).eos_token_id, layout=layout)
    parts = [layout.gather(score(layout.rows(part))) for _, part in rollout.chunks(said, BATCH)]
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(said.index)], *parts), worth


@functools.lru_cache(maxsize=1)
def _said(run: ppo.Config, model: Path, prompts: int, times: int) -> tuple[Rollout, np.ndarray]:
    """`answers` without scores, once for all the reward models that are asked next."""
    layout = parallel.layout(run.devices)
    given: dict[str, Any] = {"compute": run.compute, "place": layout.sharding}
    policy, reference = (models.load(path, **given) for path in (model, run.init))
    tokenizer = models.tokenizer_of(policy)
    rows = sources.rows(run.data, "prompts", data_dir=run.data_dir)
    asked = [rows[int(index)] for index in np.linspace(0, len(rows) - 1, prompts)]
    said = rollout.episodes(
        policy,
        reference,
        best_of_n.repeat(pipeline.every_prompt(asked, tokenizer, length=run.prompt_length)[0], times),
        named_key(run.seed, "study/answers"),
        batch=BATCH,
        max_new_tokens=run.max_new_tokens,
        temperature=run.ppo.temperature,
        layout=layout,
    )
    texts = rollout.texts(tokenizer, said.tokens[:, -run.max_new_tokens :], said.response_mask)
    asked_of = [prompt_text(asked[int(index)]["prompt"]) for index in said.index]
    return said, np.array([gold(prompt, text) for prompt, text in zip(asked_of, texts, strict=True)])


def interpolated(
    points: Sequence[Point], measure: str, where: np.ndarray, of: Callable[[float], float] = float
) -> np.ndarray:
    """`measure` at these KLs, or values of a function `of` them, between the points; nan beyond the last one."""
    ordered = sorted((of(max(point["kl"], 0.0)), point[measure]) for point in points)
    across, up = np.array(ordered).T
    return np.interp(where, across, up, right=np.nan)


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation over seeds (with Bessel's correction); 0 for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def band(values: Sequence[np.ndarray], where: np.ndarray) -> list[tuple[float, float, float]]:
    """Mean and standard deviation over seeds at each place that every seed has reached."""
    reached = [(float(x), column) for x, column in zip(where, np.transpose(values), strict=True)]
    return [(x, float(column.mean()), spread(column)) for x, column in reached if not np.any(np.isnan(column))]


def mean_sd(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """Mean and standard deviation over seeds, for a table; a dash where some seed has no value."""
    if np.any(np.isnan(values)):
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {spread(values):.{digits}f}" if len(values) > 1 else mean


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def page(cfg: Config, name: str) -> tuple[Path, str, str] | None:
    """A page to renew, if there is one, and what people wrote before and after the part that the study owns."""
    if cfg.docs is None:
        return None
    path = cfg.docs / f"{name}.md"
    try:
        before, rest = path.read_text().split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a page with the marks {BEGIN} and {END}, once each; --docs None writes none"
        ) from error
    return path, before, after


def publish(cfg: Config, name: str, text: str, draw: Callable[[Path], Any]) -> None:
    """Print and keep the table and plot of a study; renew its page in `docs`."""
    text += f"\nSeeds: {', '.join(map(str, range(cfg.seeds)))}.\n"
    print(f"\n{text}", flush=True)
    runs.write(cfg.out / f"{name}.md", text)
    draw(cfg.out / f"{name}.png")
    if around := page(cfg, name):
        path, before, after = around
        runs.write(path, f"{before}{BEGIN}\n\n{text}\n{END}{after}")
        draw(path.with_suffix(".png"))
