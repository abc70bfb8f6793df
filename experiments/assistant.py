"""The quickstart: the whole recipe on the assistant world (pretrain, fine-tune, rank, train a reward model, PPO).

Each stage is the experiment of the same name and starts from the model directory of an earlier stage. At the end every
stage is evaluated on held-out prompts; the results are printed, and written to summary.json, stages.png and answers.md.

Run:     python -m experiments.assistant --seed 0
Parent:  pretrain, sft, rank, reward, ppo, evaluate
Result:  the first table of README.md, under Results
"""

import dataclasses
import json
import resource
import time
from pathlib import Path
from typing import Annotated

from experiments import evaluate, ppo, pretrain, rank, reward, sft
from rlhf_jax import runs
from rlhf_jax.devices import hosts
from rlhf_jax.runs import cli, log, plots
from rlhf_jax.settings import Range


# The types of the stages are quoted, since inside the class a field's name hides the module of the same name.
@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """The settings of the quickstart. Sizes of stages default to those of their files; `--ppo.steps 10` sets one."""

    out: Path = Path("runs/quickstart")  # run directory; each stage has a folder in it
    data_dir: Path | None = None  # type: ignore[assignment]  # prepared data sets; None: the folder "data" of `out`
    # Answers from which best-of-n selects.
    best_of: Annotated[int, Range(least=2, unit="answers to pick from")] = 4
    pretrain: "pretrain.Config" = pretrain.Config()
    sft: "sft.Config" = sft.Config()
    rank: "rank.Config" = rank.Config()
    reward: "reward.Config" = reward.Config()
    ppo: "ppo.Config" = ppo.Config()
    evaluate: "evaluate.Config" = evaluate.Config()


@dataclasses.dataclass(frozen=True)
class Stages:
    """The configuration of each stage."""

    pretrain: "pretrain.Config"
    sft: "sft.Config"
    rank: "rank.Config"
    reward: "reward.Config"
    ppo: "ppo.Config"
    evaluate: "evaluate.Config"


def stages(cfg: Config) -> Stages:
    """The configuration of each stage; raises InputError for a flag without effect."""
    out, shared = cfg.out, dataclasses.replace(cfg, data_dir=cfg.data_dir or cfg.out / "data")
    base, tuned, judge, final = (out / stage / "model" for stage in ("pretrain", "sft", "reward", "ppo"))
    return Stages(
        pretrain=cli.hand_down("pretrain", cfg.pretrain, shared, out=out / "pretrain"),
        sft=cli.hand_down("sft", cfg.sft, shared, init=base, out=out / "sft"),
        rank=cli.hand_down(
            "rank",
            cfg.rank,
            shared,
            init=tuned,
            out=out / "rank",
            temperature=cfg.ppo.algorithm.temperature,
            prompt_length=cfg.ppo.prompt_length,
            max_new_tokens=cfg.ppo.max_new_tokens,
        ),
        reward=cli.hand_down(
            "reward",
            cfg.reward,
            shared,
            init=tuned,
            out=out / "reward",
            data=str(out / "rank" / "train.jsonl"),
            held_out=str(out / "rank" / "held_out.jsonl"),
        ),
        ppo=cli.hand_down("ppo", cfg.ppo, shared, init=tuned, reward=(judge,), out=out / "ppo"),
        evaluate=cli.hand_down(
            "evaluate",
            cfg.evaluate,
            shared,
            model=final,
            reference=tuned,
            reward=judge,
            best_of=1,
            out=None,
            temperature=cfg.ppo.algorithm.temperature,
            prompt_length=cfg.ppo.prompt_length,
            max_new_tokens=cfg.ppo.max_new_tokens,
        ),
    )


def main(cfg: Config) -> dict:
    """Run the stages one after the other, and evaluate them; returns the summary."""
    start = time.monotonic()
    out = cfg.out
    configs = stages(cfg)  # refuses flags without effect before anything runs
    runs.claim(out, cfg)
    runs.write_config(out, cfg)
    base, tuned, final = configs.sft.init, configs.ppo.init, configs.evaluate.model
    runs.once(pretrain.main, configs.pretrain)
    runs.once(sft.main, configs.sft)
    agreement = runs.once(rank.main, configs.rank)
    accuracy = runs.once(reward.main, configs.reward)
    runs.once(ppo.main, configs.ppo)
    print(f"\n== evaluate ({time.monotonic() - start:.0f} s)", flush=True)

    def assess(name: str, model: Path, best_of: int = 1) -> dict:
        print(f"{name}: ", end="", flush=True)
        file = out / "evaluate" / f"{name}.json"
        return evaluate.main(dataclasses.replace(configs.evaluate, model=model, best_of=best_of, out=file))

    results = {"base": assess("base", base), "SFT": assess("SFT", tuned), "PPO": assess("PPO", final)}
    picked = assess("best-of-n", tuned, cfg.best_of)
    summary = {
        "seed": cfg.seed,
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "pretrain": {name: results["base"][name] for name in ("gold", "nll")} | last_loss(out / "pretrain"),
        "sft": {name: results["SFT"][name] for name in ("gold", "reward", "nll")} | last_loss(out / "sft"),
        "reward": accuracy | agreement,
        "best_of_n": {name: picked[name] for name in ("n", "gold", "kl", "reward")},
        "ppo": {name: results["PPO"][name] for name in ("gold", "reward", "kl", "nll")},
    }
    runs.write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report(out, results, summary)
    return summary


def last_loss(out: Path) -> dict[str, float]:
    """{"held_out_loss": the loss on held-out rows after the last step of the run in `out`}; empty if it was not taken.

    It is empty on all processes but the first, which alone has the records.
    """
    last = log.read(out)[-1] if hosts.first() else {}
    return {"held_out_loss": last["loss/held_out"]} if "loss/held_out" in last else {}


def report(out: Path, stages: dict[str, dict], summary: dict) -> None:
    """Print the results of the stages and their answers to three prompts; write stages.png and answers.md."""
    panels = {
        "gold score on held-out prompts (0 to 1)": {name: stage["gold"] for name, stage in stages.items()},
        "loss on held-out text (nats a token)": {name: stage["nll"] for name, stage in stages.items()},
    }
    categories = stages["PPO"]["gold_by_category"]
    panels |= {f"gold: {c}": {name: stage["gold_by_category"][c] for name, stage in stages.items()} for c in categories}
    plots.stages(out / "stages.png", panels)
    print(f"\n{'stage':<10}{'gold':>7}{'reward':>8}{'KL (nats)':>11}{'text nll':>10}")
    for name, stage in stages.items():
        print(f"{name:<10}{stage['gold']:>7.3f}{stage['reward']:>8.2f}{stage['kl']:>11.2f}{stage['nll']:>10.3f}")
    best = summary["best_of_n"]
    print(f"{'best of ' + str(best['n']):<10}{best['gold']:>7.3f}{best['reward']:>8.2f}{best['kl']:>11.2f}{'':>10}")
    print(f"\n{'gold by':<10}" + "".join(f"{name:>14}" for name in categories))
    for name, stage in stages.items():
        print(f"{name:<10}" + "".join(f"{stage['gold_by_category'][category]:>14.3f}" for category in categories))
    accuracy, agreement = summary["reward"]["accuracy"], summary["reward"].get("labeler_agreement")
    agreeing = "" if agreement is None else f"; labelers agree on {100 * agreement:.1f} %"
    print(f"\nreward model: {100 * accuracy:.1f} % of held-out comparisons{agreeing}")

    def cell(text: str) -> str:
        return "<br>".join(text.replace("|", r"\|").splitlines())

    lines = ["| prompt | " + " | ".join(stages) + " |", "| --- " * (len(stages) + 1) + "|"]
    for n, answer in enumerate(stages["PPO"]["answers"]):
        responses = [stage["answers"][n]["response"] for stage in stages.values()]
        lines.append("| " + " | ".join(map(cell, [answer["prompt"], *responses])) + " |")
        if n < 3:
            print(f"\n{answer['prompt']}")
            for name, text in zip(stages, responses, strict=True):
                print(f"  {name:<5} {' '.join(text.split())}")
    runs.write(out / "answers.md", "\n".join(lines) + "\n")
    print(f"\n{summary['seconds']:.0f} s, {summary['peak_memory_gib']:.1f} GiB; everything is in {out}")


if __name__ == "__main__":
    cli.run(main, Config())
