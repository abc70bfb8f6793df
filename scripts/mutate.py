"""Breaks the functions of the maths in a handful of ways each, and shows that the suite catches each one.

    python scripts/mutate.py                 every mutant; exits with 1 if one survives
    python scripts/mutate.py --only gae      those of one function, or of several, or of modules

A mutant is one change of one function's source in a copy of the repository, under which the tests of its module run
until the first that fails. A survivor is printed with its change: a test is missing.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf_jax.runs import compiled

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """Where and what: `old` stands once in the function, and becomes `new`."""

    module: str  # below rlhf_jax/
    function: str
    old: str
    new: str


def mutants(module: str, function: str, *changes: tuple[str, str]) -> list[Mutant]:
    return [Mutant(module, function, old, new) for old, new in changes]


MUTANTS = [
    *mutants(
        "logprobs",
        "token_logprobs",
        ("/ temperature", "* temperature"),
        ("chosen - jax.nn.logsumexp", "chosen + jax.nn.logsumexp"),
    ),
    *mutants(
        "logprobs",
        "_forward",
        ("chosen - total, (", "chosen + total, ("),
        ("chosen - total, (", "chosen.astype(jnp.int32) - total, ("),
        ("jax.nn.logsumexp(logits, axis=-1)", "jax.nn.logsumexp(logits, axis=1)[..., 0][:, None]"),
    ),
    *mutants(
        "logprobs",
        "_backward",
        ("tokens) - jnp.exp", "tokens) + jnp.exp"),
        ("logits - total", "logits + total"),
        ("grads[..., None] *", "grads[..., None] * 0.5 *"),
    ),
    *mutants("logprobs", "_is_token", ("== tokens[..., None]", "== tokens[..., None] + 1")),
    *mutants(
        "logprobs",
        "entropy",
        ("return -jnp.sum", "return jnp.sum"),
        ("/ temperature", ""),
        ("jnp.exp(logp) * logp", "logp"),
    ),
    *mutants(
        "logprobs",
        "kl_estimate",
        ("precise(logp) - precise(logp_ref)", "precise(logp_ref) - precise(logp)"),
        ("0.5 * d**2", "d**2"),
        ("jnp.expm1(-d) + d", "jnp.expm1(d) - d"),
        ("jnp.expm1(-d) + d", "jnp.exp(-d) + d"),
    ),
    *mutants(
        "logprobs", "map_columns", ("jnp.moveaxis(x, 0, 1).reshape", "x.reshape"), ("parts * size - columns", "0")
    ),
    *mutants("logprobs", "kl_full", ("logp - logq", "logq - logp"), ("jnp.exp(logp)", "jnp.exp(logq)")),
    *mutants("logprobs", "response_mask", ("- is_eos == 0", "== 0"), ("- is_eos == 0", "- is_eos <= 1")),
    *mutants(
        "logprobs",
        "masked_mean",
        ("jnp.sum(jnp.where(mask, x, 0.0))", "jnp.sum(x)"),
        ("jnp.sum(mask) if count is None else count", "jnp.sum(mask)"),
        ("jnp.maximum(count, 1)", "x.size"),
    ),
    *mutants(
        "algorithms/advantages",
        "token_rewards",
        ("-kl_coef", "kl_coef"),
        ("jnp.where(mask, -kl_coef", "jnp.where(mask | True, -kl_coef"),
        ("== last_index(score_mask)[:, None]", "== last_index(score_mask)[:, None] - 1"),
        ("return penalty +", "return jnp.where(is_last, 0.0, penalty) +"),
        ("mask if score_mask is None else score_mask", "mask"),
    ),
    *mutants(
        "algorithms/advantages",
        "gae",
        ("reward + gamma * next_value", "reward + next_value"),
        ("gamma * lam * advantage", "lam * advantage"),
        ("gamma * lam * advantage", "gamma * advantage"),
        ("value = precise(jnp.where(mask, value, 0.0))", "value = precise(value)"),
        ("delta_t + gamma * lam * advantage, 0.0)", "delta_t + gamma * lam * advantage, advantage)"),
        ("value[:, 1:], ((0, 0), (0, 1))", "value[:, :-1], ((0, 0), (1, 0))"),
        ("reverse=True", "reverse=False"),
        ("advantage.T + value", "advantage.T"),
    ),
    *mutants(
        "algorithms/advantages",
        "length_adaptive",
        ("1 - 1 / (", "1 / ("),
        ("(alpha * jnp", "(jnp"),
        ("1)), 0.0)", "1)), -9.0)"),
    ),
    *mutants(
        "algorithms/advantages",
        "whiten",
        ("masked_mean(x, mask)", "jnp.mean(x)"),
        ("jnp.sum(mask) - ddof", "jnp.sum(mask)"),
        ("if shift_mean else whitened + mean", "if shift_mean else whitened"),
        ("variance + 1e-8", "variance + 1e-2"),
        ("jnp.where(mask, whitened if", "jnp.where(mask | True, whitened if"),
        ("jax.lax.rsqrt(variance + 1e-8)", "1 / (variance + 1e-8)"),
    ),
    *mutants(
        "algorithms/advantages",
        "group_normalize",
        ("ddof=ddof", "ddof=1 - ddof"),
        ("+ 1e-4", "+ 1e-1"),
    ),
    *mutants(
        "algorithms/advantages",
        "subtract_mean",
        ("axis=1, keepdims=True", "axis=0, keepdims=True"),
        ("return difference - jnp.mean", "return difference + jnp.mean"),
        ("precise(reward) - precise(reward[:, :1])", "precise(reward)"),
    ),
    *mutants("algorithms/advantages", "leave_one_out", ("(size / (size - 1))", "1")),
    *mutants(
        "algorithms/sft",
        "next_token_loss",
        ("-token_logprobs", "token_logprobs"),
        ("mask, count)", "mask | True, count)"),
        ("mask, count)", "mask)"),
    ),
    *mutants(
        "algorithms/sft",
        "loss",
        ("-logp, batch.target[:, 1:]", "-logp, batch.target[:, :-1]"),
        ("-logp, batch.target[:, 1:]", "logp, batch.target[:, 1:]"),
        ("batch.segment, keys", "batch.segment > 0, keys"),
    ),
    *mutants(
        "algorithms/sft",
        "evaluate",
        ("mask = batch.target[:, 1:]", "mask = batch.target[:, :-1]"),
        ("jnp.where(mask, logp, 0.0)", "logp"),
    ),
    *mutants(
        "algorithms/reward",
        "pair_mask",
        ("<", "<="),
        ("present = rank >= 0", "present = rank >= -1"),
        ("rank[:, :, None] < rank[:, None, :]", "rank[:, :, None] > rank[:, None, :]"),
    ),
    *mutants(
        "algorithms/reward", "pair_mean", ("/ jnp.maximum(pairs, 1)", ""), ("pairs > 0, count", "pairs >= 0, count")
    ),
    *mutants(
        "algorithms/reward",
        "bradley_terry_loss",
        ("margins(score, pair) - margin", "margins(score, pair) + margin"),
        ("-(1 - label_smoothing)", "-1"),
        ("jax.nn.log_sigmoid(-difference)", "jax.nn.log_sigmoid(difference)"),
        ("pair_mean(loss, pair, count)", "pair_mean(loss, pair, None)"),
    ),
    *mutants(
        "algorithms/reward",
        "margins",
        ("score[:, :, None] - score[:, None, :]", "score[:, None, :] - score[:, :, None]"),
    ),
    *mutants("algorithms/reward", "centring_loss", ("score[:, :, None] + score", "score[:, :, None] - score")),
    *mutants("algorithms/reward", "choice_loss", ("-chosen", "chosen"), ("best[:, None]", "0 * best[:, None]")),
    *mutants(
        "algorithms/reward",
        "ranked_choice_loss",
        ("jnp.argmin", "jnp.argmax"),
        ("jnp.any(pair_mask(rank), axis=(1, 2))", "best >= 0"),
    ),
    *mutants(
        "algorithms/reward",
        "correct_pairs",
        ("0.5 * (1 + jnp.sign(margin))", "(margin >= 0)"),
        ("0.5 * (1 + jnp.sign(margin))", "0.5 * (1 - jnp.sign(margin))"),
    ),
    *mutants(
        "algorithms/reward",
        "normalize",
        ('params["bias"] - mean', 'params["bias"] + mean'),
        ('params["kernel"] / std', 'params["kernel"] * std'),
    ),
    *mutants(
        "algorithms/updates",
        "final_score",
        ("jnp.where(rollout.ended, 0.0, cfg.unfinished_penalty)", "cfg.unfinished_penalty"),
        ("jnp.where(rollout.ended, score, cfg.unfinished_score)", "score"),
    ),
    *mutants("algorithms/updates", "response_kl", ("rollout.logp - rollout.logp_ref, 0.0", "rollout.logp, 0.0")),
    *mutants(
        "algorithms/updates",
        "auxiliary_losses",
        ("= -masked_mean(entropy", "= masked_mean(entropy"),
        ("total += cfg.ptx_coef * ", "total += "),
        ('count=totals["text"]', "count=None"),
    ),
    *mutants(
        "algorithms/updates",
        "apply",
        ("jax.random.fold_in(state.rng, state.step)", "state.rng"),
        ("jax.random.fold_in(key, epoch)", "key"),
        ('metrics["policy/approx_kl"] <= cfg.stop_kl', 'metrics["policy/approx_kl"] >= cfg.stop_kl'),
        ("progress.active & (", "("),
        ('history.pop("ratio_error")[0]', 'history.pop("ratio_error")[-1]'),
        ("totals=parallel.psum(totals, axis)", "totals=totals"),
        ("jax.tree.map(jnp.sum, metrics)", "jax.tree.map(jnp.mean, metrics)"),
        (
            "ragged.order(jnp.any(ragged.blocks(objective.live(local), block), axis=1), parts)",
            "jnp.arange(len(rows) // block)",
        ),
        ("[..., None] * objective.group", "[..., None]"),
    ),
    *mutants("algorithms/updates", "step", ("1 - cfg.ema", "cfg.ema")),
    *mutants(
        "algorithms/ppo",
        "policy_loss",
        ("plain = -advantage * ratio", "plain = advantage * ratio"),
        ("jnp.clip(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))", "ratio"),
        ("1 + (clip if clip_high is None else clip_high)", "None"),
        ("jnp.maximum(plain, clipped)", "jnp.minimum(plain, clipped)"),
        ("clipped > plain", "clipped >= plain"),
        ("0.5 * jnp.square(log_ratio)", "jnp.square(log_ratio)"),
        ("precise(jnp.where(mask, logp - logp_old, 0.0))", "precise(logp - logp_old)"),
        ("advantage < 0", "advantage > 0"),
        ("masked_mean(surrogate, mask, count)", "masked_mean(surrogate, mask)"),
    ),
    *mutants(
        "algorithms/ppo",
        "penalty_policy_loss",
        ("ratio - 1 - log_ratio", "ratio - 1 + log_ratio"),
        ("+ beta * kl", "- beta * kl"),
        ("advantage, 0.0) * ratio", "advantage, 0.0) * log_ratio"),
    ),
    *mutants(
        "algorithms/ppo",
        "value_loss",
        ("0.5 * masked_mean", "masked_mean"),
        ("jnp.maximum(plain, clipped)", "jnp.minimum(plain, clipped)"),
        ("jnp.clip(value, value_old - clip, value_old + clip)", "value"),
        ("jnp.clip(value, value_old - clip, value_old + clip)", "jnp.clip(value, target - clip, target + clip)"),
    ),
    *mutants(
        "algorithms/ppo",
        "estimate",
        ("cfg.lam if cfg.lam_alpha is None", "cfg.lam if cfg.lam_alpha is not None"),
        ("_, target = gae(reward", "advantage, target = gae(reward"),
        ("cfg.gamma, cfg.critic_lam", "cfg.gamma, lam"),
    ),
    *mutants(
        "algorithms/ppo",
        "adapt_kl_coef",
        ("kl / target - 1.0", "1.0 - kl / target"),
        ("n / horizon", "1 / horizon"),
        ("-0.2, 0.2", "-2.0, 2.0"),
    ),
    *mutants(
        "algorithms/reward",
        "cost_loss",
        ("-margins(cost, pair)", "margins(cost, pair)"),
        ("jnp.where(harmful, cost, -cost)", "jnp.where(harmful, -cost, cost)"),
        ("2 * masked_mean", "masked_mean"),
        ("masked_mean(each, has_pair, count)", "jnp.mean(each)"),
    ),
    *mutants(
        "algorithms/rewards",
        "lagrangian",
        ("- multiplier * precise", "+ multiplier * precise"),
        (" / (1 + multiplier)", ""),
    ),
    *mutants(
        "algorithms/rewards",
        "update_multiplier",
        ("cfg.multiplier_lr * multiplier * (", "cfg.multiplier_lr * ("),
        ("cost - cfg.threshold", "cost"),
        ("jnp.minimum", "jnp.maximum"),
    ),
    *mutants(
        "algorithms/rewards",
        "update_moments",
        ("moments.mean + difference * count / total", "mean"),
        ("+ squares + jnp", "+ jnp"),
        (" + jnp.square(difference) * moments.count * count / total", ""),
    ),
    *mutants("algorithms/rewards", "normalize", ("- moments.mean[None]", ""), ("jax.lax.rsqrt", "jnp.sqrt")),
    *mutants("algorithms/rewards", "weighted_sum", (" * jnp.array(weights, jnp.float32)[None]", "")),
    *mutants(
        "algorithms/rewards",
        "adjust",
        ("-cfg.clip, cfg.clip", "0.0, cfg.clip"),
        ("score - penalty", "score + penalty"),
        (" * jnp.sum(rollout.response_mask, axis=1)", " * jnp.ones_like(score)"),
    ),
    *mutants(
        "algorithms/process_reward",
        "targets",
        ("label >= 0 if", "label > 0 if"),
        ("step & (label != 0)", "step & (label > 0)"),
    ),
    *mutants(
        "algorithms/process_reward",
        "loss",
        ("output, -output)", "-output, output)"),
        (", learnt, count)", ", right, count)"),
    ),
    *mutants("algorithms/grpo", "step_rewards", ("jnp.cumsum(over, axis=1) - over", "jnp.cumsum(over, axis=1)")),
    *mutants(
        "algorithms/grpo",
        "step_advantages",
        (
            "jnp.cumsum(jnp.flip(centred.reshape(reward.shape), 1), axis=1)",
            "jnp.flip(centred.reshape(reward.shape), 1)",
        ),
        (" / (deviation + 1e-4)", ""),
        (" - jnp.sum(below, axis=(1, 2), keepdims=True) / count", ""),
    ),
    *mutants(
        "algorithms/grpo",
        "process_advantages",
        ("reward - cfg.kl_coef", "reward + cfg.kl_coef"),
        ("rollout.step | last", "rollout.step"),
    ),
    *mutants("rollouts/judge", "both_orders", ("forward == -swapped", "forward == swapped")),
    *mutants("rollouts/judge", "ranks", ("reverse=True", "reverse=False")),
    *mutants(
        "data/steps",
        "find",
        ("inside & ~ends", "inside"),
        ("inside & (ends | last)", "inside & ends"),
        (" - closed.astype", " + closed.astype"),
    ),
    *mutants("models/directory", "_means", ("total / len(values)", "total / 2"), ("total += value", "total += first")),
    *mutants(
        "algorithms/dpo",
        "sigmoid_terms",
        ("-(1 - label_smoothing)", "(1 - label_smoothing)"),
        ("(beta * h)", "(h)"),
        ("(-beta * h)", "(beta * h)"),
    ),
    *mutants("algorithms/dpo", "ipo_terms", ("0.5 / beta", "1 / beta")),
    *mutants(
        "algorithms/dpo",
        "loss",
        ("(logp_rejected - ref_rejected)", "(logp_rejected + ref_rejected)"),
        ("(logp_chosen - ref_chosen) - ", "(logp_chosen - ref_chosen) + "),
    ),
    *mutants("algorithms/online_dpo", "ranks", ("> score[:, :, None]", ">= score[:, :, None]")),
    *mutants(
        "algorithms/online_dpo",
        "extremes",
        (
            "jnp.argmax(score, axis=1), jnp.argmin(score, axis=1)",
            "jnp.argmin(score, axis=1), jnp.argmax(score, axis=1)",
        ),
    ),
    *mutants(
        "algorithms/online_dpo",
        "loss",
        ("logp - rollout.logp_ref", "logp - rollout.logp"),
        ("if cfg.per_token", "if not cfg.per_token"),
        ('totals["prompts"]', "len(rank)"),
        ("cfg.beta * pair_mean", "pair_mean"),
    ),
    *mutants(
        "algorithms/preferences", "sequence_logprobs", ("jnp.where(mask, logp, 0.0)", "logp"), ("jnp.sum(", "jnp.mean(")
    ),
    *mutants(
        "algorithms/grpo",
        "loss",
        ('policy * totals["tokens"] / totals["weights"]', "policy"),
        ('"k3"', '"k2"'),
        ("total + cfg.kl_coef *", "total - cfg.kl_coef *"),
        ("batch.advantage[:, None]) * weight", "batch.advantage[:, None])"),
    ),
    *mutants(
        "algorithms/grpo",
        "weights",
        ("mask / jnp.maximum(length, 1)", "mask * 1.0"),
        ("jnp.sum(length > 0)", "jnp.sum(mask)"),
    ),
    *mutants("algorithms/rloo", "experience", ("score - cfg.kl_coef", "score + cfg.kl_coef")),
    *mutants("algorithms/rloo", "loss", ("jnp.where(mask, x, 0.0)", "x"), ("rollout.logp))", "logp))")),
    *mutants("algorithms/best_of_n", "kl", ("(n - 1) / n", "(n - 1)"), ("math.log(n) -", "math.log(n) +")),
    *mutants("algorithms/best_of_n", "select", ("np.argmax", "np.argmin"), ("n * np.arange", "np.arange")),
    *mutants(
        "algorithms/best_of_n",
        "selection_scores",
        ("- 2 * np.ptp", "+ 2 * np.ptp"),
        ("episodes.ended, ", "~episodes.ended, "),
    ),
    *mutants(
        "algorithms/best_of_n",
        "expected",
        ("math.comb(below, n - 1)", "math.comb(below, n)"),
        ("np.argsort(score", "np.argsort(-score"),
    ),
    *mutants("analysis/overoptimization", "reinforcement", ("- beta * d", "+ beta * d"), ("np.log(", "np.log2(")),
    *mutants("analysis/overoptimization", "best_of_n", ("alpha - beta * d", "alpha - beta")),
    *mutants(
        "models/lora",
        "split",
        ("inputs**-0.5", "inputs"),
        ("fold_in(key, n)", "fold_in(key, 0)"),
        ("path[-2] in cfg.kernels", "True"),
    ),
    *mutants(
        "models/lora",
        "attach",
        ("cfg.alpha / cfg.rank", "cfg.alpha * cfg.rank"),
        ('"kernel_b" and cfg.rank', '"kernel_b" and 0'),
    ),
    *mutants(
        "models/experts",
        "balance_loss",
        ("experts * jnp", "jnp"),
        ("/ active", ""),
        ("jnp.where(mask[..., None], x, 0.0)", "x"),
    ),
    *mutants(
        "models/experts", "route", ("if normalized", "if not normalized"), ("axis=-1, keepdims", "axis=0, keepdims")
    ),
    *mutants(
        "models/experts",
        "compute_sorted",
        ("jnp.where(used, permute", "jnp.where(True, permute"),
        ("permute(made, inverse, order)", "permute(made, order, inverse)"),
        ("jnp.where(used, product", "jnp.where(True, product"),
    ),
    *mutants("algorithms/balance", "attach", ("weight / shares", "weight"), ("if not weight", "if weight is None")),
    *mutants("models/lora", "merge", ("kernel + change", "kernel - change")),
    *mutants("devices/parallel", "accumulate", ("jax.tree.map(jnp.add, total, grads)", "grads")),
    *mutants("devices/shared", "worthwhile", ("group * answer", "answer"), ("prompt >= LEAST", "prompt > LEAST")),
    *mutants("devices/shared", "rows", ("count // parallel.row_devices()", "group")),
    *mutants("devices/shared", "fork", ("jnp.arange(width, 0, -1)", "jnp.arange(width - 1, -1, -1)")),
    *mutants(
        "models/attention",
        "attend_fork",
        ("mask[:, at, at]", "jnp.ones_like(mask[:, at, at])"),
        ("of_prefix.reshape(query.shape) + of_branch", "of_prefix.reshape(query.shape) - of_branch"),
    ),
    *mutants("models/attention", "softmax", ("scores - jnp.max", "scores + jnp.max")),
    *mutants(
        "models/attention",
        "_softmax_jvp",
        ("change - jnp.sum", "change + jnp.sum"),
        ("jnp.sum(weights * change", "jnp.sum(change"),
        ("return weights, weights * (", "return weights, ("),
    ),
    *mutants("devices/parallel", "psum", ("== 1", "> 0")),
    *mutants("devices/parallel", "row_keys", ("first + row_index(rows, axis)", "row_index(rows, None)")),
    *mutants(
        "algorithms/optim", "cosine", ("final_fraction * peak", "final_fraction"), ("alpha=final_fraction", "alpha=0.0")
    ),
]

EXTRA = {
    "logprobs": ["algorithms/test_gradients"],
    "algorithms/advantages": ["algorithms/test_gradients"],
    "algorithms/rloo": ["algorithms/test_grpo"],
    "algorithms/grpo": ["algorithms/test_process_reward"],
    "models/directory": ["models/test_average"],
    "algorithms/updates": ["algorithms/test_ppo", "algorithms/test_grpo"],
}  # tests beside the module's own


def changed(mutant: Mutant) -> str:
    """The module's source with the mutant in place; leaves with a message where it does not fit."""
    path = ROOT / "rlhf_jax" / f"{mutant.module}.py"
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    node = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == mutant.function), None)
    if node is None:
        raise SystemExit(f"{mutant}: the module has no function {mutant.function}")
    body = ast.get_source_segment(source, node)
    assert body and source.count(body) == 1, mutant
    _, quote, after = body.partition('"""')
    doc, end, code = after.partition('"""')
    if code.count(mutant.old) != 1:
        raise SystemExit(f"{mutant}: the old text stands {code.count(mutant.old)} times in the code")
    return source.replace(body, f"{body.partition(quote)[0]}{quote}{doc}{end}{code.replace(mutant.old, mutant.new)}")


def tests_of(module: str, root: Path) -> list[str]:
    """The test files that are to catch the mutants of a module."""
    room, _, name = module.rpartition("/")
    names = [f"{room}/test_{name}".lstrip("/"), *EXTRA.get(module, [])]
    return [f"tests/{name}.py" for name in names if (root / "tests" / f"{name}.py").exists()]


def caught(mutant: Mutant, cache: Path) -> bool:
    """Whether a test fails under the mutant."""
    return not passes(mutant.module, changed(mutant), cache)


def passes(module: str, source: str, cache: Path) -> bool:
    """Whether the tests of a module pass when this is its source; `cache` keeps compiled programs."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "docs", "*.egg-info"))
        if (shared := ROOT.parent / "shared").is_dir():
            (Path(folder) / "shared").symlink_to(shared)
        (copy / "rlhf_jax" / f"{module}.py").write_text(source)
        tests = tests_of(module, copy)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        # What a mutant leaves alone is compiled once for all of them.
        found = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        compiled.trim(cache, 2**30)
        env = os.environ | found | {"PYTHONPATH": str(copy)}
        run = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        if run.returncode not in (0, 1):
            raise SystemExit(f"{module}: pytest ended with {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        return run.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of functions or of modules")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.only or {m.function, m.module.rpartition("/")[2]} & set(args.only)]
    for mutant in chosen:
        changed(mutant)  # so that one that no longer fits the source is reported at once
    if not chosen:
        parser.error(f"--only {' '.join(args.only)}: no mutant of that function or module")
    start, survivors = time.monotonic(), []
    with tempfile.TemporaryDirectory() as cache, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for module in dict.fromkeys(mutant.module for mutant in chosen):
            if not passes(module, (ROOT / "rlhf_jax" / f"{module}.py").read_text(encoding="utf-8"), Path(cache)):
                raise SystemExit(f"{module}: its tests fail without any change, so they would catch everything")
        verdicts = pool.map(functools.partial(caught, cache=Path(cache)), chosen)
        for n, (mutant, found) in enumerate(zip(chosen, verdicts, strict=True), 1):
            if not found:
                survivors.append(mutant)
            verdict = "caught  " if found else "SURVIVED"
            print(
                f"{n}/{len(chosen)} {verdict} {mutant.module}.{mutant.function}: {mutant.old!r} -> {mutant.new!r}",
                flush=True,
            )
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught in {time.monotonic() - start:.0f} s")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
