"""The stages that the studies share: one fine-tuned model, the labels of each seed, and resuming where they stopped.

A study is several experiments at several seeds. A seed is that of the labels, of the reward model and of the policy;
the fine-tuned model is the same for all. Studies with the same `out` share what they have in common, and a command that
is run again makes only what is missing.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from experiments import ppo, pretrain, rank, reward, sft
from rlhf_jax import runs
from rlhf_jax.runs import cli, timing
from rlhf_jax.settings import Count, Seed
from rlhf_jax.types import InputError

BEGIN, END = "<!-- made by the study: begin -->", "<!-- end -->"

C = TypeVar("C", bound="Seeds")
T = TypeVar("T")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Seeds(runs.Stage):
    """What a study of several seeds needs to know."""

    seed: Seed = 0  # of the fine-tuned model, and the first of the seeds
    out: Path = Path("runs/studies")  # run directory, shared by the studies
    data_dir: Path | None = None  # type: ignore[assignment]  # where prepared data sets are kept; None is the folder "data" in `out`
    docs: Path | None = Path("docs")  # folder of the pages whose tables and plots are renewed; None for none
    seeds: Count = 4  # number of seeds, of labels, reward model and policy
    jobs: Count = 1  # seeds at a time, each in a process of its own: for CPUs, where models so small leave cores idle

    @property
    def each_seed(self) -> range:
        """The seeds that the study compares."""
        return range(self.seed, self.seed + self.seeds)


# The types of the stages are quoted: by the time they were evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config(Seeds):
    """Sizes with which four seeds of every study take two CPU cores less than an hour."""

    prompts: Count = 1600  # prompts whose answers are ranked, a seed
    pretrain: "pretrain.Config" = pretrain.Config()
    sft: "sft.Config" = sft.Config()
    rank: "rank.Config" = rank.Config(held_out=96)
    reward: "reward.Config" = reward.Config()
    ppo: "ppo.Config" = ppo.Config()


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """The settings in which a reward model differs from the others of its seed."""

    prompts: int  # ranked prompts to learn from, the first ones
    preset: str  # architecture: it starts from the fine-tuned model of this size
    epochs: int = 1  # passes over the prompts


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model that was learnt."""

    model: Path  # model directory
    accuracy: float  # share of held-out comparisons


def shared_settings(cfg: Seeds, seed: int) -> runs.Stage:
    """The settings that every stage of a seed takes from the study."""
    return runs.Stage(
        seed=seed,
        out=cfg.out,
        data_dir=cfg.data_dir or cfg.out / "data",
        compute=cfg.compute,
        devices=cfg.devices,
    )


def run_each(cfg: C, function: Callable[[C, T], Result], items: Iterable[T]) -> list[Result]:
    """`function(cfg, item)` of each item, `cfg.jobs` at a time. Where one fails or is interrupted, all are."""
    if cfg.jobs == 1:
        return [function(cfg, item) for item in items]
    spawn = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(cfg.jobs, spawn, cli.prepare) as pool:
        try:
            return list(pool.map(functools.partial(function, cfg), items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def fine_tune(cfg: Config, preset: str | None = None) -> Path:
    """Pretrain and fine-tune a model of this size, by default the policy's; returns its model directory."""
    preset = preset or cfg.pretrain.preset
    out, shared = cfg.out / preset, shared_settings(cfg, cfg.seed)
    sized = dataclasses.replace(cfg.pretrain, preset=preset)
    base = cli.hand_down("pretrain", sized, shared, out=out / "pretrain")
    tuned = cli.hand_down("sft", cfg.sft, shared, init=base.out / "model", out=out / "sft")
    runs.once(pretrain.main, base)
    runs.once(sft.main, tuned)
    return tuned.out / "model"


def all_labels(cfg: Config) -> RewardSpec:
    """The reward model of the policy's size that learns from every ranked prompt."""
    return RewardSpec(cfg.prompts, cfg.pretrain.preset)


def rank_answers(cfg: Config, seed: int) -> Path:
    """Have the answers of the fine-tuned model ranked and rated, once for a seed; returns the folder of the labels."""
    ranked = cli.hand_down(
        "rank",
        cfg.rank,
        shared_settings(cfg, seed),
        out=cfg.out / f"seed{seed}" / "rank",
        init=fine_tune(cfg),
        prompts=cfg.prompts,
        temperature=cfg.ppo.algorithm.temperature,
        prompt_length=cfg.ppo.prompt_length,
        max_new_tokens=cfg.ppo.max_new_tokens,
    )
    runs.once(rank.main, ranked)
    return ranked.out


def learn_reward(cfg: Config, seed: int, spec: RewardSpec) -> RewardModel:
    """A reward model that has learnt from the labels of `rank_answers`."""
    ranked = rank_answers(cfg, seed)
    labels = labels_path(cfg, seed, spec.prompts)
    with (ranked / "train.jsonl").open(encoding="utf-8") as rows:
        runs.write(labels, "".join(itertools.islice(rows, spec.prompts)))
    learnt = cli.hand_down(
        "reward",
        cfg.reward,
        shared_settings(cfg, seed),
        out=cfg.out / f"seed{seed}" / f"reward-{spec.preset}-{spec.prompts}",
        init=fine_tune(cfg, spec.preset),
        data=str(labels),
        held_out=str(ranked / "held_out.jsonl"),
        epochs=spec.epochs,
    )
    result = runs.once(reward.main, learnt)
    return RewardModel(learnt.out / "model", result["accuracy"])


def labels_path(cfg: Config, seed: int, prompts: int) -> Path:
    """The file of the rankings of the first prompts, which `learn_reward` writes."""
    return cfg.out / f"seed{seed}" / "rank" / f"first{prompts}.jsonl"


def ppo_run(cfg: Config, seed: int, judge: Path, out: Path) -> ppo.Config:
    """The configuration of PPO from the fine-tuned model against the reward model in `judge`."""
    return cli.hand_down(
        "ppo",
        cfg.ppo,
        shared_settings(cfg, seed),
        out=out,
        init=fine_tune(cfg),
        reward=(judge,),
    )


def train(experiment: Callable[[Any], Any], run: Any) -> float:
    """Run an experiment, unless that is done; returns its seconds without compilation, since its last interruption."""

    def timed(run: Any) -> dict[str, float]:
        start, compiled = time.monotonic(), timing.compile_seconds()
        experiment(run)
        return {"seconds": time.monotonic() - start - (timing.compile_seconds() - compiled)}

    return runs.once(timed, run)["seconds"]


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of a folder, and whether Python files differ from it; None without Git.

    Other files may differ, such as pages that another study has renewed.
    """
    ask = lambda *words: subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout
    try:
        found = ask("describe", "--always", "--exclude=*").strip()
        return f"{found} with changes" if ask("status", "--porcelain", "-uno", ":(top)*.py") else found
    except (OSError, subprocess.CalledProcessError):
        return None


def read_page(cfg: Seeds, name: str) -> tuple[Path, str, str] | None:
    """The page to renew, if there is one, and what people wrote before and after the part that the study owns."""
    if cfg.docs is None:
        return None
    path = cfg.docs / f"{name}.md"
    try:
        before, rest = path.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a page with the marks {BEGIN} and {END}, once each; --docs None writes none"
        ) from error
    return path, before, after


def publish(cfg: Seeds, name: str, text: str, draw: Callable[[Path], Any]) -> None:
    """Print and keep the table and plot of a study; renew its page in `docs`."""
    code = commit()
    text += f"\nSeeds: {', '.join(map(str, cfg.each_seed))}.{f' Commit: {code}.' if code else ''}\n"
    print(f"\n{text}", flush=True)
    runs.write(cfg.out / f"{name}.md", text)
    draw(cfg.out / f"{name}.png")
    if page := read_page(cfg, name):
        path, before, after = page
        runs.write(path, f"{before}{BEGIN}\n\n{text}\n{END}{after}")
        draw(path.with_suffix(".png"))
