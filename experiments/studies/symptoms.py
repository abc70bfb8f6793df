"""Does `experiments.diagnose` name the fault of a run that has one? Runs of the world, each with one fault planted.

Each takes well under a minute, from the models of a quickstart. The last five are healthy. docs/troubleshooting.md has
what came out; `--only NAME` makes one of them.

Run:     python -m experiments.studies.symptoms --quickstart runs/quickstart
Parent:  ppo, reward
Result:  13 of 13 planted faults are named first, and nothing of the 5 healthy runs; 440 s of processor time in all
"""

import contextlib
import dataclasses
import functools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import diagnose, grpo, ppo, pretrain, reward
from rlhf_jax import models, runs
from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.analysis import symptoms
from rlhf_jax.data.tokenizer import Prompt
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.runs import checkpoint, cli, log, plots
from rlhf_jax.settings import Count, Seed, Settings
from rlhf_jax.types import InputError, Rollout


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of the study."""

    quickstart: Path = Path("runs/quickstart")  # directory of a quickstart, whose models the runs begin with
    out: Path = Path("runs/symptoms")  # directory for the runs and symptoms.json
    only: tuple[str, ...] = ()  # names of runs to make, such as nan; none: all
    seed: Seed = 0  # seed of the planted runs; the healthy ones have those after it
    steps: Count = 30  # rollouts of a run of PPO
    rankings: Count = 1200  # prompts that a reward model learns from


ANEW = checkpoint.Config(resume="never")


def main(cfg: Config) -> dict[str, Any]:
    """Make the runs, ask what is wrong with each, and write what was said."""
    if unknown := set(cfg.only) - RUNS.keys():
        raise InputError(f"--only {' '.join(sorted(unknown))}: expected some of {', '.join(RUNS)}")
    if not (cfg.quickstart / "sft" / "model").is_dir():
        raise InputError(f"--quickstart {cfg.quickstart}: expected the directory of a quickstart, with its models")
    path = cfg.out / "symptoms.json"  # keeps what was said of runs that are not made again
    rows = {row["run"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
    for name in cfg.only or RUNS:
        planted, make = RUNS[name]
        start = time.process_time()
        with contextlib.suppress(log.BrokenRunError):  # which ends a run at its first bad step
            make(cfg, cfg.out / name)
        found = diagnose.main(diagnose.Config(run=cfg.out / name))["symptoms"]
        seconds = round(time.process_time() - start, 1)
        rows[name] = {"run": name, "planted": planted, "found": found, "seconds": seconds}
        print(f"== {name}: {planted or 'healthy'}; named: {', '.join(found) or 'nothing'}", flush=True)
    right = sum(row["found"][:1] == ([row["planted"]] if row["planted"] else []) for row in rows.values())
    print(f"{right} of {len(rows)} as planted")
    known = [rows[name] for name in RUNS if name in rows]
    runs.write(path, json.dumps(known, indent=2) + "\n")
    draw(cfg)
    return {"runs": known}


# The metrics that tell, by the name of the run. `nan` and `ratio` end at their first step, and pairs tell of `length`.
TOLD_BY = {
    "negative-kl": ("kl/reference",),
    "chance": ("reward/accuracy",),
    "stuck": ("loss/next_token",),
    "critic": ("value/explained_variance",),
    "short": ("response/tokens",),
    "long": ("response/tokens",),
    "entropy": ("policy/entropy",),
    "kl": ("kl/reference",),
    "gold": ("score", "gold"),
    "slow": ("seconds/score",),
}
HEALTHY = {"chance": "healthy-reward", "stuck": "healthy-pretrain"}  # and for the others healthy-1


def draw(cfg: Config) -> None:
    """Draw the metrics that tell of each planted fault beside those of a healthy run, into symptoms.png."""
    panels = {}
    for name, metrics in TOLD_BY.items():
        beside = HEALTHY.get(name, "healthy-1")
        if all((cfg.out / run / "metrics.jsonl").is_file() for run in (name, beside)):
            courses = {"healthy": diagnose.read(cfg.out / beside), "planted": diagnose.read(cfg.out / name)}
            for metric in metrics:
                panels[f"{name}: {metric}"] = {label: points(course, metric) for label, course in courses.items()}
    if panels:
        plots.lines(cfg.out / "symptoms.png", panels, x="step")


def points(course: symptoms.Course, name: str) -> list[tuple[int, float]]:
    """A metric by step, or the mean score or gold of the answers to the prompts that stay the same."""
    if name not in ("score", "gold"):
        return [(row["step"], row[name]) for row in course.metrics if row.get(name) is not None]
    steps = sorted({answer.step for answer in course.answers})
    at = lambda step: [getattr(answer, name) for answer in course.answers if answer.step == step]
    return [(step, float(np.mean(at(step)))) for step in steps]


USUAL = ppo.Config()


def policy(
    cfg: Config,
    out: Path,
    algorithm: ppo_lib.Config = USUAL.algorithm,
    text: str | None = USUAL.text,
    lr: float = USUAL.lr,
) -> ppo.Config:
    """PPO from the quickstart's models at its defaults, but for the length of the run and what is given."""
    return dataclasses.replace(
        USUAL,
        algorithm=algorithm,
        text=text,
        lr=lr,
        seed=cfg.seed,
        out=out,
        data_dir=cfg.out / "data",
        init=cfg.quickstart / "sft" / "model",
        reward=(cfg.quickstart / "reward" / "model",),
        steps=cfg.steps,
        samples_every=cfg.steps // 2,
        token_samples=64,
        saves=ANEW,
    )


def too_large_steps(cfg: Config, out: Path) -> None:
    """Steps of the optimiser that throw the weights out of range."""
    ppo.main(dataclasses.replace(policy(cfg, out, lr=1e5), warmup=0, adam=optim.Adam(clip_norm=1e9)))


@contextlib.contextmanager
def patched(name: str, function: Callable) -> Iterator[None]:
    """`rollout` with another function of this name: a change of one line in its code."""
    former = getattr(rollout, name)
    setattr(rollout, name, function)
    try:
        yield
    finally:
        setattr(rollout, name, former)


COLLECT = rollout.collect


def collect_cooler(*args: Any, cfg: sampling.Config, **others: Any) -> Rollout:
    """Sampled at a temperature that the loss does not know of."""
    return COLLECT(*args, cfg=dataclasses.replace(cfg, temperature=0.5), **others)


def collect_unseen(params: Any, *args: Any, cfg: sampling.Config, policy: Any, **others: Any) -> Rollout:
    """Sampled at a temperature that the log-probabilities do not know of either: they tell of another distribution."""
    cooler = dataclasses.replace(cfg, temperature=0.1)
    sampled = COLLECT(params, *args, cfg=cooler, policy=policy, **others)
    logprobs_fn, on = models.logprobs_fn(policy.config), sampled.response_mask
    read = functools.partial(
        logprobs_fn,
        tokens=sampled.tokens,
        segment=sampled.mask,
        start=sampled.tokens.shape[1] - on.shape[1] - 1,
        temperature=cfg.temperature,
    )
    logp, logp_ref = (jnp.where(on, read(params[name])[0], 0.0) for name in ("policy", "reference"))
    return sampled.replace(logp=jax.lax.stop_gradient(logp), logp_ref=logp_ref)


def other_temperature(cfg: Config, out: Path) -> None:
    with patched("collect", collect_cooler):
        ppo.main(policy(cfg, out))


def unseen_temperature(cfg: Config, out: Path) -> None:
    with patched("collect", collect_unseen):  # the entropy bonus makes the policy flatter than what is sampled of it
        ppo.main(policy(cfg, out, dataclasses.replace(USUAL.algorithm, entropy_coef=0.1), text=None))


def rankings(cfg: Config, out: Path, rank: Callable[[dict], list[int]]) -> tuple[Path, Path]:
    """The quickstart's rankings with other ranks: files to learn from, and to test on."""
    paths = []
    for name, count in (("train", cfg.rankings), ("held_out", 100)):
        lines = (cfg.quickstart / "rank" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        text = "".join(json.dumps(row | {"ranks": rank(row)}) + "\n" for row in rows)
        paths.append(out.with_name(f"{out.name}-{name}.jsonl"))
        runs.write(paths[-1], text)
    return paths[0], paths[1]


def judge(cfg: Config, out: Path, rank: Callable[[dict], list[int]], epochs: int = 1) -> None:
    """Train a reward model on such rankings."""
    data, held_out = rankings(cfg, out, rank)
    run = reward.Config(
        seed=cfg.seed,
        out=out,
        data_dir=cfg.out / "data",
        init=cfg.quickstart / "sft" / "model",
        data=str(data),
        held_out=str(held_out),
        epochs=epochs,
        saves=ANEW,
    )
    reward.main(run)


def shuffled_labels(cfg: Config, out: Path) -> None:
    order = random.Random(cfg.seed)
    judge(cfg, out, lambda row: order.sample(row["ranks"], len(row["ranks"])))


def labels_by_length(cfg: Config, out: Path) -> None:
    judge(cfg, out, lambda row: [-len(text.split()) + 100 for text in row["responses"]])


def pretraining(cfg: Config, out: Path, lr: float = pretrain.Config.lr) -> None:
    """The first stage, cut short."""
    pretrain.main(
        dataclasses.replace(
            pretrain.Config(), seed=cfg.seed, out=out, data_dir=cfg.out / "data", steps=2 * cfg.steps, lr=lr, saves=ANEW
        )
    )


def tiny_steps(cfg: Config, out: Path) -> None:
    """Steps of the optimiser that change next to nothing."""
    pretraining(cfg, out, lr=1e-8)


def idle_critic(cfg: Config, out: Path) -> None:
    ppo.main(dataclasses.replace(policy(cfg, out), critic_lr=1e-8))


def scored_by(
    score: Callable[[str], float], longest: int = USUAL.max_new_tokens, steps: int | None = None
) -> Callable[[Config, Path], None]:
    """PPO against a function of the answer."""

    def score_text(prompt: Prompt, response: str) -> float:
        return score(response)

    def make(cfg: Config, out: Path) -> None:
        run = policy(cfg, out, dataclasses.replace(USUAL.algorithm, kl_coef=0.02, unfinished_score=None), text=None)
        ppo.main(dataclasses.replace(run, max_new_tokens=longest, steps=steps or run.steps), score_text)

    return make


def slow(response: str) -> float:
    """A reward that takes its time."""
    time.sleep(0.04)
    return 0.0


def without_entropy(cfg: Config, out: Path) -> None:
    ppo.main(policy(cfg, out, dataclasses.replace(USUAL.algorithm, entropy_coef=-1.0), text=None, lr=1e-3))


def without_reference(cfg: Config, out: Path) -> None:
    free = dataclasses.replace(USUAL.algorithm, entropy_coef=1.0, kl_coef=0.0)
    ppo.main(policy(cfg, out, free, text=None, lr=1e-3))


def few_labels(cfg: Config, out: Path) -> None:
    """A reward model of a few rankings, which the policy follows without restraint."""
    few = out.with_name(f"{out.name}-reward")
    judge(dataclasses.replace(cfg, rankings=32), few, lambda row: row["ranks"], epochs=4)
    run = policy(cfg, out, dataclasses.replace(USUAL.algorithm, kl_coef=0.0), text=None, lr=1e-3)
    ppo.main(dataclasses.replace(run, reward=(few / "model",)))


def healthy(seed: int) -> Callable[[Config, Path], None]:
    """PPO with nothing wrong."""

    def make(cfg: Config, out: Path) -> None:
        ppo.main(policy(dataclasses.replace(cfg, seed=cfg.seed + seed), out))

    return make


def healthy_grpo(cfg: Config, out: Path) -> None:
    run = policy(cfg, out)
    grpo.main(
        dataclasses.replace(
            grpo.Config(),
            seed=cfg.seed + 3,
            out=out,
            data_dir=run.data_dir,
            init=run.init,
            reward=run.reward,
            steps=run.steps,
            samples_every=run.samples_every,
            token_samples=run.token_samples,
            saves=ANEW,
        )
    )


def healthy_reward(cfg: Config, out: Path) -> None:
    judge(dataclasses.replace(cfg, seed=cfg.seed + 4), out, lambda row: row["ranks"])


def healthy_pretrain(cfg: Config, out: Path) -> None:
    pretraining(dataclasses.replace(cfg, seed=cfg.seed + 5), out)


# Each run, with the symptom that is to be named first; None where nothing is to be.
RUNS: dict[str, tuple[str | None, Callable[[Config, Path], None]]] = {
    "nan": ("The loss is NaN", too_large_steps),
    "ratio": ("The ratio is not 1 at the first step", other_temperature),
    "negative-kl": ("The KL is negative", unseen_temperature),
    "chance": ("The reward model is near chance", shuffled_labels),
    "length": ("The reward model prefers length", labels_by_length),
    "stuck": ("The loss does not fall", tiny_steps),
    "critic": ("The value loss does not fall", idle_critic),
    "short": ("Answers end at once", scored_by(lambda text: -float(len(text.split())))),
    "long": ("Answers grow", scored_by(lambda text: 0.2 * len(text.split()), longest=32)),
    "entropy": ("The entropy collapses", without_entropy),
    "kl": ("The KL explodes", without_reference),
    "gold": ("Reward up, gold down", few_labels),
    "slow": ("Rollouts are slow", scored_by(slow, steps=symptoms.FEWEST)),
    "healthy-1": (None, healthy(1)),
    "healthy-2": (None, healthy(2)),
    "healthy-grpo": (None, healthy_grpo),
    "healthy-reward": (None, healthy_reward),
    "healthy-pretrain": (None, healthy_pretrain),
}


if __name__ == "__main__":
    cli.run(main, Config())
