"""Which way to use the same labels buys most gold for the distance? Every algorithm, from the same start.

All learn from the rankings of one seed: some by a reward model that learnt from them, some directly. Those with a
reward model go without a KL penalty, and their distance grows along the run; the others are run once for each of two
settings.

Run:     python -m experiments.studies.frontier
Parent:  ppo, grpo, rloo, online_dpo, rejection, dpo, kto, simpo, orpo, slic, distill
Result:  docs/frontier.md
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import distill, dpo, grpo, kto, online_dpo, orpo, ppo, rejection, reward, rloo, sft, simpo, slic
from experiments.studies import courses, study, tables
from experiments.studies.tables import Point
from rlhf_jax import runs
from rlhf_jax.algorithms import dpo as dpo_lib
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import kto as kto_lib
from rlhf_jax.algorithms import online_dpo as online_dpo_lib
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.algorithms import rloo as rloo_lib
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import NonNegative
from rlhf_jax.types import InputError

NAME = "frontier"
BEST_OF = 4  # answers of which rejection sampling keeps one


@dataclasses.dataclass(frozen=True)
class Course:
    """Where an algorithm goes from the labels of one seed."""

    points: list[Point]  # the first is where all start
    seconds: float = math.nan  # of training, without compilation; of one run on average; nan where nothing is trained


def main(cfg: "Config") -> dict[str, list[Course]]:
    """Run what has not been run, then write table and plot; returns the course of each algorithm and seed."""
    study.read_page(cfg, NAME)  # refused before anything runs
    study.fine_tune(cfg)
    seeds = study.run_each(cfg, run_seed, cfg.each_seed)
    results = {name: [found[name] for found in seeds] for name in cfg.algorithms}
    report(cfg, results)
    return results


def run_seed(cfg: "Config", seed: int) -> dict[str, Course]:
    """Run each algorithm on the labels of a seed; returns their courses."""
    judge = study.learn_reward(cfg, seed, study.all_labels(cfg)).model
    found = {}
    for name in cfg.algorithms:
        found[name] = ALGORITHMS[name](cfg, seed, judge, name)
        jax.clear_caches()  # the programs of all would be too many for the address space
    return found


def place(cfg: "Config", seed: int, name: str) -> Path:
    """The run directory of an algorithm."""
    return cfg.out / f"seed{seed}" / NAME / "-".join(re.findall(r"[a-z0-9.]+", name.lower()))


def start(cfg: "Config", seed: int, judge: Path) -> Point:
    """The place of the fine-tuned model, as this reward model scores it."""
    return measure(cfg, seed, judge, place(cfg, seed, f"start {judge.parent.name}"), study.fine_tune(cfg))


def measure(cfg: "Config", seed: int, judge: Path, out: Path, model: Path) -> Point:
    """The place of a model; `out` keeps it."""
    asked = study.ppo_run(cfg, seed, judge, out)
    return runs.once(courses.measure, courses.Trained(out, asked, model, 8 * cfg.answered))


def pick_best(cfg: "Config", seed: int, judge: Path, _: str) -> Course:
    """The course of best-of-n, which trains nothing."""
    return Course(courses.best_of_n_course(cfg, seed, judge))


def follow(
    cfg: "Config",
    seed: int,
    judge: Path,
    name: str,
    experiment: Callable[[Any], Any] = ppo.main,
    config: Any = None,
    times: int = 1,
) -> Course:
    """The course of an algorithm that follows a reward model, for `times` as many episodes as PPO (`cfg.ppo`)."""
    run = cli.hand_down(
        name,
        config or cfg.ppo,
        study.shared_settings(cfg, seed),
        out=place(cfg, seed, name),
        init=study.fine_tune(cfg),
        reward=(judge,),
        data=cfg.ppo.data,
        text=cfg.ppo.text,
        prompt_length=cfg.ppo.prompt_length,
        max_new_tokens=cfg.ppo.max_new_tokens,
        batch=times * cfg.ppo.batch,
        steps=cfg.ppo.steps,
        samples_every=cfg.ppo.samples_every,
        samples=cfg.ppo.samples,
        token_samples=cfg.ppo.token_samples,
    )
    seconds = study.train(experiment, run)
    return Course([start(cfg, seed, judge), *courses.read_course(run.out)], seconds)


def follow_whole_rankings(cfg: "Config", seed: int, judge: Path, name: str) -> Course:
    """The course of PPO with a reward model that learnt each ranking as a whole (Plackett-Luce)."""
    loss = dataclasses.replace(cfg.reward.algorithm, loss="plackett_luce")
    learnt = cli.hand_down(
        "reward",
        dataclasses.replace(cfg.reward, algorithm=loss),
        study.shared_settings(cfg, seed),
        out=place(cfg, seed, f"{name} reward"),
        init=study.fine_tune(cfg),
        data=str(study.labels_path(cfg, seed, cfg.prompts)),
        held_out=None,
    )
    runs.once(reward.main, learnt)
    return follow(cfg, seed, learnt.out / "model", name)


def reject(cfg: "Config", seed: int, judge: Path, name: str) -> Course:
    """The course of rejection sampling, which answers as often as PPO."""
    run = cli.hand_down(
        name,
        rejection.Config(
            prompts=cfg.ppo.steps * cfg.ppo.batch // BEST_OF,
            best_of=BEST_OF,
            sft=sft.Config(lr=3e-4, epochs=1, text=cfg.ppo.text),
        ),
        study.shared_settings(cfg, seed),
        out=place(cfg, seed, name),
        init=study.fine_tune(cfg),
        reward=judge,
        data=cfg.ppo.data,
        prompt_length=cfg.ppo.prompt_length,
        max_new_tokens=cfg.ppo.max_new_tokens,
    )
    seconds = study.train(rejection.main, run)
    return ended(cfg, seed, judge, [(run.out, run.out / "sft" / "model", seconds)])


def learn(
    cfg: "Config",
    seed: int,
    judge: Path,
    name: str,
    experiment: Callable[[Any], Any],
    configs: tuple[Any, ...],
    write: Callable[["Config", int], Path] | None = None,
) -> Course:
    """The course of an algorithm that learns from the labels directly: where a run of each of its settings ends.

    `write` turns the rankings into the labels that it learns from, and returns their file.
    """
    data = write(cfg, seed) if write else study.labels_path(cfg, seed, cfg.prompts)
    ends = []
    for number, config in enumerate(configs):
        run = cli.hand_down(
            name,
            config,
            study.shared_settings(cfg, seed),
            out=place(cfg, seed, f"{name} {number}"),
            init=study.fine_tune(cfg),
            data=str(data),
        )
        ends.append((run.out, run.out / "model", study.train(experiment, run)))
    return ended(cfg, seed, judge, ends)


def imitate(cfg: "Config", seed: int, judge: Path, name: str, teacher: str) -> Course:
    """The course of distillation from the last model of another algorithm of the table, which `learn` trains."""
    ALGORITHMS[teacher](cfg, seed, judge, teacher)
    last = ALGORITHMS[teacher].keywords["configs"]
    run = cli.hand_down(
        name,
        distill.Config(),
        study.shared_settings(cfg, seed),
        out=place(cfg, seed, name),
        init=study.fine_tune(cfg),
        teacher=place(cfg, seed, f"{teacher} {len(last) - 1}") / "model",
        data=cfg.ppo.data,
        prompt_length=cfg.ppo.prompt_length,
        max_new_tokens=cfg.ppo.max_new_tokens,
        batch=cfg.ppo.batch,
        steps=cfg.ppo.steps,
    )
    return ended(cfg, seed, judge, [(run.out, run.out / "model", study.train(distill.main, run))])


def ended(cfg: "Config", seed: int, judge: Path, runs_done: list[tuple[Path, Path, float]]) -> Course:
    """The course through where runs ended, each with its directory, its model and its seconds."""
    ends = [measure(cfg, seed, judge, out / "answers", model) for out, model, _ in runs_done]
    return Course([start(cfg, seed, judge), *ends], float(np.mean([seconds for _, _, seconds in runs_done])))


def write_thumbs(cfg: "Config", seed: int) -> Path:
    """The file of the rankings as thumbs: up for answers above the middle of their ranking, down for those below."""
    ranked = study.labels_path(cfg, seed, cfg.prompts)
    rows = []
    for line in ranked.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        middle = float(np.mean(row["ranks"]))
        for response, rank, is_ended in zip(row["responses"], row["ranks"], row["ended"], strict=True):
            if rank != middle:
                said = {"prompt": row["prompt"], "completion": response, "label": rank < middle, "ended": is_ended}
                rows.append(json.dumps(said) + "\n")
    thumbs = ranked.with_name(f"thumbs{cfg.prompts}.jsonl")
    runs.write(thumbs, "".join(rows))
    return thumbs


def follow_chance(cfg: ppo.Config) -> object:
    """PPO on scores that are drawn anew for each answer, so that nothing can be learnt."""
    draws = np.random.default_rng(cfg.seed)
    return ppo.main(cfg, lambda prompt, response: float(draws.normal()))


# What the algorithms have in common with PPO's settings here: minibatches, no KL penalty, a score for cut answers.
_PPO = ppo_lib.Config(minibatches=4, kl_coef=0.0, unfinished_score=-1.0)
_GRPO = grpo_lib.Config(minibatches=4, group=4, kl_coef=0.0, kl_in="reward", unfinished_score=-1.0)
_RLOO = rloo_lib.Config(minibatches=4, group=4, kl_coef=0.0, unfinished_score=-1.0)
_ONLINE = online_dpo.Config(algorithm=online_dpo_lib.Config(minibatches=2, group=4, beta=0.1, unfinished_score=-1.0))
_VAPO = dataclasses.replace(_PPO, clip_high=0.28, lam_alpha=0.05, critic_lam=1.0, critic_first=4)

Row = functools.partial[Course]


def _ppo(algorithm: ppo_lib.Config = _PPO, lr: float = ppo.Config.lr, times: int = 1) -> Row:
    return functools.partial(follow, config=ppo.Config(lr=lr, algorithm=algorithm), times=times)


def _grpo(algorithm: grpo_lib.Config = _GRPO, resample: int = 0) -> Row:
    config = grpo.Config(algorithm=algorithm, resample=resample)
    return functools.partial(follow, experiment=grpo.main, config=config)


def _dpo(*algorithms: dpo_lib.Config) -> Row:
    configs = tuple(dpo.Config(algorithm=algorithm) for algorithm in algorithms)
    return functools.partial(learn, experiment=dpo.main, configs=configs)


def _kto(*betas: float) -> Row:
    configs = tuple(kto.Config(algorithm=kto_lib.Config(beta=beta)) for beta in betas)
    return functools.partial(learn, experiment=kto.main, configs=configs, write=write_thumbs)


PANELS: dict[str, dict[str, Row]] = {
    "by a reward model": {
        "best-of-n": functools.partial(pick_best),
        "PPO": functools.partial(follow),
        "PPO, Plackett-Luce": functools.partial(follow_whole_rankings),
        "PPO, a third of the rate": _ppo(lr=1e-4),
        "PPO, that and 4 x episodes": _ppo(lr=1e-4, times=4),
        "PPO, random scores": functools.partial(follow, experiment=follow_chance),
        "VAPO": _ppo(_VAPO),
        "RLOO": functools.partial(follow, experiment=rloo.main, config=rloo.Config(algorithm=_RLOO)),
        "online DPO": functools.partial(follow, experiment=online_dpo.main, config=_ONLINE),
        "rejection": functools.partial(reject),
    },
    "GRPO and its kin": {
        "GRPO": _grpo(),
        "Dr. GRPO": _grpo(dataclasses.replace(_GRPO, scale=False, mean="constant")),
        "DAPO": _grpo(dataclasses.replace(_GRPO, clip_high=0.28, mean="token", soft_limit=4), resample=1),
        "GSPO": _grpo(dataclasses.replace(_GRPO, ratio="response", clip=3e-4, clip_high=4e-4)),
        "CISPO": _grpo(dataclasses.replace(_GRPO, surrogate="cispo", clip=1.0, clip_high=4.0, mean="token")),
        "REINFORCE++": _grpo(dataclasses.replace(_GRPO, baseline="batch", mean="token")),
        "REINFORCE++, baseline": _grpo(dataclasses.replace(_GRPO, baseline="both", mean="token")),
    },
    "from the labels directly": {
        "DPO": _dpo(dpo_lib.Config(beta=0.5), dpo_lib.Config(beta=0.1)),
        "IPO": _dpo(dpo_lib.Config(beta=0.5, loss="ipo"), dpo_lib.Config(beta=0.1, loss="ipo")),
        "robust DPO": _dpo(
            dpo_lib.Config(beta=0.5, loss="robust", label_smoothing=0.1),
            dpo_lib.Config(beta=0.1, loss="robust", label_smoothing=0.1),
        ),
        "hinge DPO": _dpo(dpo_lib.Config(beta=0.5, loss="hinge"), dpo_lib.Config(beta=0.1, loss="hinge")),
        "EXO": _dpo(
            dpo_lib.Config(beta=0.5, loss="exo", label_smoothing=1e-3),
            dpo_lib.Config(beta=0.1, loss="exo", label_smoothing=1e-3),
        ),
        "KTO": _kto(0.5, 0.1),
        "SimPO": functools.partial(learn, experiment=simpo.main, configs=(simpo.Config(lr=1e-4), simpo.Config())),
        "ORPO": functools.partial(learn, experiment=orpo.main, configs=(orpo.Config(), orpo.Config(lr=1e-3))),
        "SLiC": functools.partial(learn, experiment=slic.main, configs=(slic.Config(lr=1e-4), slic.Config())),
        "distillation of DPO": functools.partial(imitate, teacher="DPO"),
    },
}
ALGORITHMS = {name: row for rows in PANELS.values() for name, row in rows.items()}


@dataclasses.dataclass(frozen=True)
class Config(courses.Config):
    """The settings of the study; those of the algorithms stand in `ALGORITHMS`."""

    budgets: tuple[NonNegative, ...] = (0.25, 0.5, 1.0, 2.0)  # nats, at which the table compares
    algorithms: tuple[str, ...] = tuple(ALGORITHMS)  # rows of the table

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.algorithms:
            if name not in ALGORITHMS:
                raise InputError(f"algorithms: expected some of {', '.join(ALGORITHMS)}, got {name!r}")


def report(cfg: Config, results: dict[str, list[Course]]) -> None:
    """Publish a row for each algorithm: gold at each budget, where it ends, and its seconds; and one panel of all."""
    header = ["algorithm", *(f"gold at {budget:g} nats" for budget in cfg.budgets), "last gold", "at nats", "seconds"]
    rows, lines = [], {}
    for name, seeds in results.items():
        courses_of = [course.points for course in seeds]
        at_budgets = [tables.interpolate(points, "gold", np.array(cfg.budgets)) for points in courses_of]
        lasts = ([points[-1][measure] for points in courses_of] for measure in ("gold", "kl"))
        least = min(course.seconds for course in seeds)
        cells = map(tables.mean_sd, [*np.transpose(at_budgets), *lasts])
        rows.append([name, *cells, "-" if math.isnan(least) else f"{least:.0f}"])
        where = np.linspace(0.0, max(point["kl"] for points in courses_of for point in points), 25)
        lines[name] = tables.band([tables.interpolate(points, "gold", where) for points in courses_of], where)
    draw = functools.partial(
        plots.lines,
        panels={
            f"gold (0 to 1), {label}": {name: lines[name] for name in names if name in lines}
            for label, names in PANELS.items()
            if lines.keys() & names.keys()
        },
        x="KL to the fine-tuned model (nats a response)",
    )
    study.publish(cfg, NAME, tables.markdown(header, rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
