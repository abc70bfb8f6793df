"""How fast training, sampling and PPO iterations are, beside other libraries and beside the machine's limit.

    python scripts/bench.py
    python scripts/bench.py --only sft,decode --peer other=/path/to/bin/python:/path/to/peer.py

Every workload runs in a process of its own, on random weights and tokens, with the functions that the experiments use.
A peer is a script that takes `--only NAME` and ends with a line of JSON, {"peer", "versions", "results"}, as this one
does; rounds of it alternate with ours, and the table then has a column `x peer`: our median over the best median that
the peer reports for that workload under any of its variants. "Of limit" is the share that we reach of what the machine
can do: in training the limit is the time of the model's matrix products alone, at rates that this run measures for each
of their shapes; in decoding the larger of that and of reading the weights, plus reading the cache, at the bandwidth of
a copy.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import models
from rlhf_jax.algorithms import optim, ppo, reward, sft
from rlhf_jax.analysis import flops
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.rollouts import rollout, sampling, scores
from rlhf_jax.runs import cli, plots
from rlhf_jax.types import InputError, Prompts, Rankings, Tokens, TrainState, check_positive

FIRST = 5  # smaller token ids are special

# Read when a process starts, ours or a peer's: the allocator keeps what is freed, in huge pages, as in scripts/_env.sh.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclasses.dataclass(frozen=True)
class Llama:
    """The model, where no preset is named."""

    vocab: int = 4096
    hidden: int = 256
    intermediate: int = 688
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    tied_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Sft:
    """One step a repetition, on rows without padding."""

    batch: int = 16
    target_tokens: int = 128  # of each row, which has one more
    warmup_steps: int = 3
    timed_steps: int = 12


@dataclasses.dataclass(frozen=True)
class Packing:
    """The same on documents of geometric lengths, packed."""

    batch: int = 16
    length: int = 128
    mean: float = 40.0  # tokens of a document
    warmup_steps: int = 3
    timed_steps: int = 12


@dataclasses.dataclass(frozen=True)
class Decode:
    """One batch of responses without EOS a repetition."""

    batch: int = 32
    prompt: int = 32
    new: int = 64
    warmup: int = 2
    timed: int = 3


@dataclasses.dataclass(frozen=True)
class DecodeRagged:
    """Responses that end early; one pass over all prompts a repetition, at the better of the batch sizes."""

    prompts: int = 128
    prompt: int = 32
    max_new: int = 64
    eos_fraction: float = 0.03  # of the vocabulary
    batches: tuple[int, ...] = (32, 128)
    warmup: int = 1
    timed: int = 3


@dataclasses.dataclass(frozen=True)
class Reward:
    """One step of the reward model on comparisons of two responses a repetition."""

    pairs: int = 16
    length: int = 96
    warmup_steps: int = 3
    timed_steps: int = 12


@dataclasses.dataclass(frozen=True)
class RewardK:
    """One step on rankings of K responses, each scored once for all its pairs."""

    prompts: int = 16
    responses: int = 9
    length: int = 96
    warmup_steps: int = 2
    timed_steps: int = 6


@dataclasses.dataclass(frozen=True)
class RewardRagged:
    """One step on comparisons of responses of geometric lengths, beside as many parts of whole rows."""

    pairs: int = 64
    prompt: int = 32
    max_new: int = 64
    mean: float = 33.0  # tokens of a response that is not cut
    buckets: int = 8
    warmup_steps: int = 2
    timed_steps: int = 6


@dataclasses.dataclass(frozen=True)
class Ppo:
    """One iteration a repetition: sample, score by three models, update policy and critic."""

    episodes: int = 64
    prompt: int = 32
    new: int = 32
    eos_fraction: float = 0.0  # of the vocabulary
    epochs: int = 4
    minibatches: int = 1
    buckets: int = 1
    clip: float = 0.2
    value_clip: float = 0.2
    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 1.0
    warmup: int = 2
    timed: int = 5


@dataclasses.dataclass(frozen=True)
class Config:
    only: str = "sft,decode,decode_ragged,reward,ppo,reward_k9,reward_ragged,ppo_ragged,packing"  # workloads
    device: Literal["cpu", "gpu", "tpu"] | None = None  # None is the best there is
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the trunk
    preset: str | None = None  # a model of models.PRESETS instead of the Llama below
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again
    peer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # NAME=PYTHON:SCRIPT, any number of times
    rounds: int = 2  # in each of which every workload runs once, here and at every peer
    timeout: float = 1200.0  # seconds after which a run is given up
    workload: Path | None = None  # JSON file of the sizes below, by the same names
    scaling: Path | None = None  # instead, draw here how the cost grows with each of SCALES
    learning_rate: float = 1e-4
    model: Llama = Llama()
    sft: Sft = Sft()
    decode: Decode = Decode()
    decode_ragged: DecodeRagged = DecodeRagged()
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    reward_k9: RewardK = RewardK()
    reward_ragged: RewardRagged = RewardRagged()
    ppo_ragged: Ppo = Ppo(new=64, eos_fraction=0.03, buckets=8)
    packing: Packing = Packing()

    def __post_init__(self) -> None:
        check_positive(self, "rounds", "timeout")
        if unknown := [name for name in self.only.split(",") if name not in WORKLOADS]:
            raise InputError(f"only: {unknown[0]!r} is no workload: expected some of {','.join(WORKLOADS)}")
        for peer in self.peer:
            peer_command(peer)


def main(cfg: Config) -> dict[str, Any]:
    """Run every workload, here and at the peers in turn; print the table and the line of JSON."""
    cfg = with_sizes(cfg)
    if cfg.scaling is not None:
        return scaling(cfg, cfg.scaling)
    ours: dict[str, list[dict]] = {name: [] for name in cfg.only.split(",")}
    theirs: dict[str, dict[str, list[dict]]] = {peer.split("=")[0]: {name: [] for name in ours} for peer in cfg.peer}
    versions: dict[str, Any] = {package: metadata.version(package) for package in ("jax", "flax", "optax")}
    for _ in range(cfg.rounds):
        for name, found in ours.items():
            found.append(apart(cfg, name))
            for peer in cfg.peer if name in PEER_WORKLOADS else ():
                result = run_peer(peer, name, cfg.timeout)
                if result:
                    versions[peer.split("=")[0]] = result["versions"]
                    theirs[peer.split("=")[0]][name].append(result["results"][name])
    results = {name: merge(found) for name, found in ours.items()}
    print(table(results, theirs))
    report = {"peer": "rlhf_jax", "versions": versions, "results": results} | ({"peers": theirs} if theirs else {})
    print(json.dumps(report), flush=True)
    return report


def with_sizes(cfg: Config) -> Config:
    """The sizes of the file, where one is named."""
    if cfg.workload is None:
        return cfg
    try:
        given = json.loads(cfg.workload.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{cfg.workload}: expected a JSON file of sizes: {error}") from error
    sections: dict[str, Any] = {}
    for name in (*WORKLOADS, "model"):
        section = getattr(cfg, name)
        if name in given:
            fields = {field.name for field in dataclasses.fields(section)} & given[name].keys()
            values = {field: given[name][field] for field in fields}
            sections[name] = dataclasses.replace(
                section, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            )
    return dataclasses.replace(cfg, learning_rate=given.get("learning_rate", cfg.learning_rate), **sections)


def apart(cfg: Config, name: str) -> dict[str, Any]:
    """`measure` in a process of its own, so that its peak of memory is its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, cfg, name).result(timeout=cfg.timeout)


# What grows, by its name (a space tells two of one name apart): the workload, its section and field, and the values.
SCALES: dict[str, tuple[str, str, str, tuple[float, ...]]] = {
    "rows": ("sft", "sft", "batch", (4, 8, 16, 32, 64)),
    "tokens of a row": ("sft", "sft", "target_tokens", (32, 64, 128, 256, 512)),
    "vocabulary": ("sft", "model", "vocab", (1024, 4096, 16384, 65536)),
    "layers": ("sft", "model", "layers", (1, 2, 4, 8, 16)),
    "rows ": ("decode", "decode", "batch", (1, 4, 16, 32, 64, 128)),
    "new tokens": ("decode", "decode", "new", (32, 64, 128, 256, 512)),
    "vocabulary ": ("decode", "model", "vocab", (1024, 4096, 16384, 65536)),
    "layers ": ("decode", "model", "layers", (1, 2, 4, 8, 16)),
    "share of tokens that end": ("decode_ragged", "decode_ragged", "eos_fraction", (0.01, 0.03, 0.1, 0.3)),
}


def scaling(cfg: Config, path: Path) -> dict[str, Any]:
    """Microseconds a token, and peak of memory, as each of SCALES grows alone; drawn to `path`."""
    found: dict[str, Any] = {}
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for label, (name, section, field, values) in SCALES.items():
        points = []
        for value in values:
            changed = dataclasses.replace(getattr(cfg, section), **{field: value})
            result = apart(dataclasses.replace(cfg, **{section: changed}), name)
            points.append((float(value), 1e6 / result[f"median_{unit(result)}"], result["peak_mib"]))
            print(
                f"{name}, {label.strip()} {value:g}: {points[-1][1]:.1f} us a token, {points[-1][2]:.0f} MiB",
                flush=True,
            )
        found[f"{name} by {label.strip()}"] = points
        panels[f"{name}: us a token, by {label.strip()}"] = {name: [point[:2] for point in points]}
        if label == "vocabulary":
            panels[f"{name}: peak MiB, by {label}"] = {name: [(point[0], point[2]) for point in points]}
    plots.lines(path, panels, x="")
    return found


def peer_command(peer: str) -> list[str]:
    """The command that NAME=PYTHON:SCRIPT stands for; raises InputError if it is not of that form."""
    name, _, command = peer.partition("=")
    python, _, script = command.partition(":")
    if not (name and python and Path(script).is_file()):
        raise InputError(f"peer: expected NAME=PYTHON:SCRIPT with a script that exists, not {peer!r}")
    return [python, script]


def run_peer(peer: str, name: str, timeout: float) -> dict[str, Any] | None:
    """What the peer prints in the end, or None after saying why there is nothing."""
    try:
        command = [*peer_command(peer), "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        why = f"no result after {timeout:.0f} s"
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or [f"status {error.returncode}"])[-1]
    except (OSError, ValueError, IndexError) as error:
        why = f"no line of JSON: {error}"
    print(f"{peer.split('=')[0]} has no {name}: {why[:200]}")
    return None


def unit(result: dict[str, Any]) -> str:
    """What a result counts a second."""
    return next(key.removeprefix("median_") for key in result if key.startswith("median_"))


def medians(result: dict[str, Any], counted: str) -> Iterator[float]:
    """The medians of a result and of the variants within it. A plain key holds a median if no other does."""
    for key, value in result.items():
        if isinstance(value, dict):
            yield from medians(value, counted)
        elif key == f"median_{counted}" or (key == counted and f"median_{counted}" not in result):
            yield value


def merge(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several rounds: the median of medians, the best of bests, the median of the rest."""
    merged = {}
    for key in found[0]:
        values = [result[key] for result in found]
        merged[key] = max(values) if key.startswith("best_") else statistics.median(values)
    return merged


def table(results: dict[str, dict], theirs: dict[str, dict[str, list[dict]]]) -> str:
    """Results as Markdown."""
    head = ["workload", "unit", "median", "best", "of limit", "peak MiB", *(f"x {peer}" for peer in theirs)]
    lines = [head, ["---"] * len(head)]
    for name, result in results.items():
        counted = unit(result)
        line = [
            name,
            counted.replace("_per_s", "/s"),
            *(f"{result[f'{kind}_{counted}']:.1f}" for kind in ("median", "best")),
        ]
        line += [f"{result['of_limit']:.0%}", f"{result['peak_mib']:.0f}"]
        for peer in theirs.values():
            best = max((rate for run in peer[name] for rate in medians(run, counted)), default=None)
            line.append("" if best is None else f"{result[f'median_{counted}'] / best:.2f}")
        lines.append(line)
    notes = [
        f"{name}: {value:.2f} x {key.removeprefix('times_').replace('_', ' ')}"
        for name, result in results.items()
        for key, value in result.items()
        if key.startswith("times_")
    ]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + notes)


# ---------------------------------------------------------------------------------------------------------------------


def measure(cfg: Config, name: str) -> dict[str, Any]:
    """One workload, in this process: rates, their share of the limit, and the peak of memory."""
    if cfg.device is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(cfg.device, cfg.device))
    config = architecture(cfg)
    run = WORKLOADS[name](config, cfg)
    start = time.perf_counter()
    run.repeat(0)
    first = time.perf_counter() - start
    timed = [run.repeat(i) for i in range(1, run.warmup + run.timed)][run.warmup - 1 :]
    peak = peak_mib()
    values = sorted(amount / seconds for amount, seconds in timed)
    result = {f"median_{run.unit}": statistics.median(values), f"best_{run.unit}": values[-1]}
    mean = statistics.mean(amount for amount, _ in timed)
    limit = mean / run.floor(Limits(config), mean)
    result |= {f"limit_{run.unit}": limit, "of_limit": result[f"median_{run.unit}"] / limit}
    return result | {"peak_mib": peak, "first_s": first} | run.more()


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is repeated and timed."""

    unit: str
    warmup: int
    timed: int
    repeat: Callable[[int], tuple[float, float]]  # repetition i: how much it did, and its seconds
    floor: Callable[["Limits", float], float]  # the least seconds for that much
    more: Callable[[], dict[str, float]] = dict  # what else there is to say, after the timing


def architecture(cfg: Config) -> models.Config:
    """The model's config."""
    compute = models.Compute(dtype=cfg.dtype, remat=cfg.remat)
    if cfg.preset is not None:
        return dataclasses.replace(models.preset(cfg.preset), compute=compute)
    m = cfg.model
    return models.llama(
        m.layers,
        m.hidden,
        m.heads,
        m.kv_heads,
        m.intermediate,
        vocab_size=m.vocab,
        head_dim=m.head_dim,
        tie_embeddings=m.tied_embeddings,
        rope_theta=m.rope_theta,
        norm_eps=m.norm_eps,
        max_length=4096,
        compute=compute,
    )


def peak_mib() -> float:
    """The most memory that was in use: of the first device, or of this process where that is the host."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def clock(amount: float, run: Callable[[], Any]) -> tuple[float, float]:
    """`amount`, and the seconds until all that `run` returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return amount, time.perf_counter() - start


def random_ids(config: models.Config, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(FIRST, config.vocab_size, shape, dtype=np.int32)


def end_ids(config: models.Config, fraction: float) -> tuple[int, ...]:
    """The last `fraction` of the vocabulary; without any, a token that there is not."""
    count = round(fraction * config.vocab_size)
    return tuple(range(config.vocab_size - count, config.vocab_size)) or (config.vocab_size,)


def init(module: Any, seed: int) -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(module.init)(jax.random.key(seed), tokens, tokens)["params"]


class Trainer:
    """Steps of one kind on batches of one shape; holds the state."""

    def __init__(self, step: Callable, module: Any, cfg: Config, **settings: Any) -> None:
        tx = optim.adamw(cfg.learning_rate)
        self.state = parallel.replicate(optim.init(init(module, 0), tx, jax.random.key(1)))
        apply_fn = models.bind(module)
        self.step = parallel.pmap(functools.partial(step, apply_fn=apply_fn, tx=tx, **settings), donate=(0,))

    def __call__(self, batch: Any) -> Any:
        self.state, metrics = self.step(self.state, parallel.shard(batch))
        return metrics


def sft_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.sft
    tokens = random_ids(config, w.batch, w.target_tokens + 1)
    batch = Tokens(tokens=tokens, segment=np.ones_like(tokens), target=np.ones_like(tokens, bool))
    train = Trainer(sft.train_step, models.Transformer(config), cfg)
    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup_steps,
        timed=w.timed_steps,
        repeat=lambda i: clock(w.batch * w.target_tokens, lambda: train(batch)),
        floor=lambda limits, count: limits.training(w.batch, w.target_tokens, w.target_tokens),
    )


def documents(w: Packing) -> np.ndarray:
    """The number of the document that each token belongs to, [batch, length]; the last of a row is cut."""
    starts = np.random.default_rng(1).random((w.batch, w.length)) < 1 / w.mean
    starts[:, 0] = True
    return np.cumsum(starts, axis=1, dtype=np.int32)


def packing_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.packing
    tokens, segment = random_ids(config, w.batch, w.length), documents(w)
    target = np.pad(segment[:, 1:] == segment[:, :-1], ((0, 0), (1, 0)))
    batch = Tokens(tokens=tokens, segment=segment, target=target)
    train = Trainer(sft.train_step, models.Transformer(config), cfg)
    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup_steps,
        timed=w.timed_steps,
        repeat=lambda i: clock(int(target.sum()), lambda: train(batch)),
        floor=lambda limits, count: limits.training(w.batch, w.length, w.length),
    )


def rankings(config: models.Config, prompts: int, responses: int, length: int) -> Rankings:
    tokens = random_ids(config, prompts, responses, length)
    rank = np.broadcast_to(np.arange(responses, dtype=np.int32), (prompts, responses))
    return Rankings(tokens=tokens, mask=np.ones_like(tokens, bool), start=np.zeros(prompts, np.int32), rank=rank)


def reward_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.reward
    batch = rankings(config, w.pairs, 2, w.length)
    train = Trainer(reward.train_step, heads.ScalarModel(config), cfg)
    return Workload(
        unit="sequences_per_s",
        warmup=w.warmup_steps,
        timed=w.timed_steps,
        repeat=lambda i: clock(2 * w.pairs, lambda: train(batch)),
        floor=lambda limits, count: limits.training(2 * w.pairs, w.length, 1, logits=False),
    )


def reward_k9_workload(config: models.Config, cfg: Config) -> Workload:
    """Beside it, in turn, as many sequences as pairs of two."""
    w = cfg.reward_k9
    pairs, sequences = w.prompts * w.responses * (w.responses - 1) // 2, w.prompts * w.responses
    batch = rankings(config, w.prompts, w.responses, w.length)
    alone = rankings(config, sequences // 2, 2, w.length)
    train = Trainer(reward.train_step, heads.ScalarModel(config), cfg)
    times: list[tuple[float, float]] = []

    def repeat(i: int) -> tuple[float, float]:
        taken = clock(pairs, lambda: train(batch))
        times.append((taken[1], clock(sequences // 2, lambda: train(alone))[1]))
        return taken

    def more() -> dict[str, float]:
        ranked, one_by_one = (statistics.median(column) for column in zip(*times[w.warmup_steps :], strict=True))
        return {
            "median_sequences_per_s": sequences / ranked,
            "times_pairs_one_by_one": pairs / ranked / ((sequences // 2) / one_by_one),
        }

    return Workload(
        unit="pairs_per_s",
        warmup=w.warmup_steps,
        timed=w.timed_steps,
        repeat=repeat,
        floor=lambda limits, count: limits.training(sequences, w.length, 1, logits=False),
        more=more,
    )


def reward_ragged_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.reward_ragged
    new = np.minimum(np.random.default_rng(1).geometric(1 / w.mean, (w.pairs, 2)), w.max_new)
    batch = rankings(config, w.pairs, 2, w.prompt + w.max_new)
    batch = batch.replace(mask=np.arange(w.prompt + w.max_new) < w.prompt + new[..., None])
    scalar, times = heads.ScalarModel(config), []
    train = Trainer(reward.train_step, scalar, cfg, buckets=w.buckets)
    whole = Trainer(reward.train_step, scalar, cfg, microbatches=w.buckets)

    def repeat(i: int) -> tuple[float, float]:
        taken = clock(2 * w.pairs, lambda: train(batch))
        times.append((taken[1], clock(2 * w.pairs, lambda: whole(batch))[1]))
        return taken

    def more() -> dict[str, float]:
        ours, padded = (statistics.median(column) for column in zip(*times[w.warmup_steps :], strict=True))
        return {"times_padded": padded / ours}

    return Workload(
        unit="sequences_per_s",
        warmup=w.warmup_steps,
        timed=w.timed_steps,
        repeat=repeat,
        floor=lambda limits, count: limits.training(2 * w.pairs, w.prompt + new.mean(), 1, logits=False),
        more=more,
    )


def prompts_of(config: models.Config, rows: int, length: int) -> Prompts:
    tokens = random_ids(config, rows, length)
    return Prompts(tokens=tokens, mask=np.ones_like(tokens, bool), index=np.arange(rows, dtype=np.int32))


def sampler(config: models.Config, new: int, ends: tuple[int, ...]) -> Callable[[Prompts, int], sampling.Sample]:
    """Samples a response to each prompt of a batch, with the noise of a seed."""
    module = models.Transformer(config)

    def step(params: Any, prompts: Prompts, seed: jax.Array, axis: str | None) -> sampling.Sample:
        keys = parallel.row_keys(jax.random.key(seed), prompts.tokens.shape[0], axis)
        return sampling.generate(module, params, prompts.tokens, prompts.mask, keys, new, eos_id=ends)

    params, run = parallel.replicate(init(module, 0)), parallel.pmap(step)
    return lambda prompts, seed: run(params, parallel.shard(prompts), parallel.replicate(np.uint32(seed)))


def decode_workload(config: models.Config, cfg: Config) -> Workload:
    w = cfg.decode
    prompts, sample = prompts_of(config, w.batch, w.prompt), sampler(config, w.new, ())
    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup,
        timed=w.timed,
        repeat=lambda i: clock(w.batch * w.new, lambda: parallel.gather(sample(prompts, i))),
        floor=lambda limits, count: limits.decoding(w.batch, w.prompt, w.new, w.batch * w.new),
    )


def decode_ragged_workload(config: models.Config, cfg: Config) -> Workload:
    """The better of the batch sizes is found in the warm-up."""
    w = cfg.decode_ragged
    sample = sampler(config, w.max_new, end_ids(config, w.eos_fraction))
    prompts = prompts_of(config, w.prompts, w.prompt)

    def all_prompts(batch: int, i: int) -> tuple[float, float]:
        start, count = time.perf_counter(), 0
        for first, part in rollout.chunks(prompts, batch):
            count += int(parallel.gather(sample(part, 1000 * i + int(first)).mask).sum())
        return count, time.perf_counter() - start

    seconds: dict[int, float] = {}

    def repeat(i: int) -> tuple[float, float]:
        for batch in w.batches if i < w.warmup else ():
            all_prompts(batch, i)  # compiles
            seconds[batch] = all_prompts(batch, i)[1]
        return all_prompts(min(seconds, key=lambda batch: seconds[batch]), 1 + i)

    return Workload(
        unit="tokens_per_s",
        warmup=w.warmup,
        timed=w.timed,
        repeat=repeat,
        floor=lambda limits, count: limits.decoding(w.prompts, w.prompt, w.max_new, count),
    )


class Iterations:
    """PPO iterations against a random reward model, as `experiments.ppo` runs them; holds the state."""

    def __init__(self, config: models.Config, cfg: Config, w: Ppo, padded: bool = False) -> None:
        policy, scalar = models.Transformer(config), heads.ScalarModel(config)
        policy_fn, critic_fn = models.bind(policy), heads.critic(config)
        fields = {field.name for field in dataclasses.fields(ppo.Config)} & {f.name for f in dataclasses.fields(w)}
        settings = ppo.Config(**{name: getattr(w, name) for name in fields}, stop_at_eos=not padded)
        tx = ppo.optimizer(optim.adamw(cfg.learning_rate), optim.adamw(cfg.learning_rate))
        params = {"policy": init(policy, 0), "critic": init(scalar, 1)}
        self.state: TrainState = parallel.replicate(ppo.init(params, tx, settings, jax.random.key(1)))
        self.reference, judge = parallel.replicate((init(policy, 0), jax.tree.map(lambda x: x[None], init(scalar, 2))))
        self.key = parallel.replicate(jax.random.key(2))
        ends = end_ids(config, w.eos_fraction)
        self.collect = parallel.pmap(
            functools.partial(
                rollout.collect,
                policy=policy,
                policy_fn=policy_fn,
                critic_fn=critic_fn,
                max_new_tokens=w.new,
                temperature=w.temperature,
                eos_id=ends,
                stop_at_eos=settings.stop_at_eos,
                buckets=settings.buckets,
            )
        )
        score = functools.partial(
            scores.score_responses, apply_fn=models.bind(scalar), eos_id=ends[0], buckets=settings.buckets
        )
        self.score = functools.partial(parallel.pmap(score), judge)
        train = functools.partial(ppo.train_step, policy_fn=policy_fn, critic_fn=critic_fn, tx=tx, cfg=settings)
        self.train = parallel.pmap(train, donate=(0,))
        self.prompts, self.episodes = prompts_of(config, w.episodes, w.prompt), w.episodes

    def __call__(self, i: int) -> dict[str, jax.Array]:
        first = parallel.replicate(np.uint32(i * self.episodes))
        sampled = self.collect(self.state.params, self.reference, parallel.shard(self.prompts), self.key, first)
        self.state, metrics = self.train(self.state, self.score(sampled))
        return parallel.unreplicate(metrics)

    def parts(self, i: int) -> list[float]:
        """Seconds of one iteration's rollout, scoring, and updates."""
        first = parallel.replicate(np.uint32(i * self.episodes))
        batch, times = parallel.shard(self.prompts), [time.perf_counter()]
        sampled = jax.block_until_ready(self.collect(self.state.params, self.reference, batch, self.key, first))
        times.append(time.perf_counter())
        scored = jax.block_until_ready(self.score(sampled))
        times.append(time.perf_counter())
        self.state, metrics = self.train(self.state, scored)
        jax.block_until_ready(metrics)
        return [after - before for before, after in zip(times, [*times[1:], time.perf_counter()], strict=True)]


def ppo_workload(config: models.Config, cfg: Config, ragged: bool = False) -> Workload:
    w = cfg.ppo_ragged if ragged else cfg.ppo
    iterations = Iterations(config, cfg, w)
    padded = Iterations(config, cfg, dataclasses.replace(w, buckets=1), padded=True) if ragged else None
    tokens: list[float] = []
    beside: list[tuple[float, float]] = []

    def repeat(i: int) -> tuple[float, float]:
        found: dict[str, jax.Array] = {}
        taken = clock(w.episodes, lambda: found.update(iterations(i)) or found)
        tokens.append(float(found["response/tokens"]) * w.episodes)
        if padded is not None:
            beside.append((taken[1], clock(w.episodes, lambda: padded(i))[1]))
        return taken

    def floor(limits: "Limits", count: float) -> float:
        new = statistics.mean(tokens[w.warmup :])
        columns = w.prompt + new / w.episodes
        policy = limits.forward(w.episodes, columns, new / w.episodes)
        critic = limits.forward(w.episodes, columns, new / w.episodes, logits=False)
        judge = limits.forward(w.episodes, columns, 1, logits=False)
        updates = w.epochs * (3 * policy + 3 * critic)
        return limits.decoding(w.episodes, w.prompt, w.new, new) + policy + critic + judge + updates

    def more() -> dict[str, float]:
        split = [iterations.parts(1000 + i) for i in range(w.timed)]
        names = "collect_s", "score_s", "update_s"
        found = dict(zip(names, map(statistics.median, zip(*split, strict=True)), strict=True))
        if beside:
            ours, whole = (statistics.median(column) for column in zip(*beside[w.warmup :], strict=True))
            found["times_padded"] = whole / ours
        return found

    return Workload("episodes_per_s", w.warmup, w.timed, repeat, floor, more)


class Limits:
    """The least seconds that the model's matrix products and reads take on this device, at rates that are measured."""

    def __init__(self, config: models.Config) -> None:
        self.config, c = config, config
        width, ff = c.n_heads * c.head_dim, c.d_ff if c.mlp == "gelu" else 2 * c.d_ff
        maps = [
            (c.d_model, width + 2 * c.n_kv_heads * c.head_dim),
            (width, c.d_model),
            (c.d_model, ff),
            (c.d_ff, c.d_model),
        ]
        self.layer, self.words = maps, (c.d_model, c.vocab_size)
        self.dtype = jnp.dtype(c.compute.dtype)

    @functools.cache  # noqa: B019
    def product(self, m: int, k: int, n: int) -> float:
        """Seconds of [m, k] @ [k, n], as a mean of it and the two products of its gradient."""
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], (m, k), self.dtype)
        w = jax.random.normal(keys[1], (k, n), self.dtype)
        chain = 3

        @jax.jit
        def products(x: jax.Array, w: jax.Array) -> jax.Array:
            with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else None):
                for _ in range(chain):
                    y = x @ w
                    x = y @ (x.T @ y).T
                return x

        return best_of(lambda: products(x, w)) / (3 * chain)

    @functools.cache  # noqa: B019
    def bandwidth(self, size: int) -> float:
        """Bytes a second that are read or written where `size` bytes are copied within the device."""
        x = jnp.zeros(max(size, 2**20) // 4, jnp.float32)
        add = jax.jit(lambda x: x + 1.0)
        return 2 * x.nbytes / best_of(lambda: add(x))

    def forward(self, rows: int, columns: float, read: float, logits: bool = True) -> float:
        """Of one forward pass, as `flops.forward` counts it, at the rates of the layers' products."""
        m = max(1, round(rows * columns))
        seconds = sum(self.product(m, k, n) for k, n in self.layer) / sum(2 * m * k * n for k, n in self.layer)
        seconds *= flops.forward(self.config, rows, columns, read, logits=False)
        return seconds + (self.product(max(1, round(rows * read)), *self.words) if logits else 0.0)

    def training(self, rows: int, columns: float, read: int, logits: bool = True) -> float:
        """Of one forward and backward pass."""
        return 3 * self.forward(rows, columns, read, logits)

    def decoding(self, rows: int, prompt: int, new: int, tokens: float) -> float:
        """Of a prefill and `tokens` new tokens, sampled for all rows at once."""
        c = self.config
        maps = [*(c.n_layers * self.layer), self.words]
        kept = 2 * c.n_layers * c.n_kv_heads * c.head_dim * self.dtype.itemsize  # bytes of a token in the cache
        cache = rows * kept * (prompt + tokens / rows / 2)  # bytes, on average over the steps
        weights = self.dtype.itemsize * sum(k * n for k, n in maps)
        speed = self.bandwidth(round(weights + cache))
        reads = [self.dtype.itemsize * k * n / speed for k, n in maps]
        step = sum(max(self.product(rows, k, n), read) for (k, n), read in zip(maps, reads, strict=True))
        return self.forward(rows, prompt, 1) + (step + cache / speed) * tokens / rows


def best_of(run: Callable[[], Any], repeats: int = 5, least: float = 0.05) -> float:
    """Seconds of the fastest of some runs, which together take at least `least` seconds."""
    jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < repeats or math.fsum(times) < least:
        times.append(clock(1, run)[1])
    return min(times)


WORKLOADS: dict[str, Callable[[models.Config, Config], Workload]] = {
    "sft": sft_workload,
    "decode": decode_workload,
    "decode_ragged": decode_ragged_workload,
    "reward": reward_workload,
    "ppo": ppo_workload,
    "reward_k9": reward_k9_workload,
    "reward_ragged": reward_ragged_workload,
    "ppo_ragged": functools.partial(ppo_workload, ragged=True),
    "packing": packing_workload,
}
PEER_WORKLOADS = "sft", "decode", "decode_ragged", "reward", "ppo"


if __name__ == "__main__":
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)
    cli.run(main, Config())
