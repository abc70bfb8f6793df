"""Cases of the maths, generated: seeded inputs, and what each formula gives for them in float64, by explicit loops.

Nothing here imports jax or the package. Gradients are central differences of the loops. A case has the inputs that its
formula takes and the values that it must give, under the names that `tests.oracles` compares.
"""

import math
from collections.abc import Callable

import numpy as np

Values = dict  # from names to numbers, lists and arrays
_CASES: dict[str, Callable[[], tuple[Values, Values]]] = {}


def case(name: str) -> tuple[Values, Values]:
    """The inputs and the expected values of the case."""
    return _CASES[name]()


def _case(function: Callable, name: str, **settings) -> None:
    _CASES[name] = lambda: function(np.random.default_rng(list(name.encode())), **settings)


def _gradient(loss: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Central differences; exact to about 1e-9 where `loss` is smooth within 1e-6 of `at`."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-6
        gradient[index] = (loss(at + step) - loss(at - step)) / 2e-6
    return gradient


def _ragged(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Contiguous spans that start anywhere; the first row has one entry, the last none."""
    mask = np.zeros((rows, columns), int)
    for row in mask[:-1]:
        first, last = sorted(rng.integers(0, columns, 2))
        row[first : last + 1] = 1
    mask[0] = np.arange(columns) == columns // 2
    return mask


def _float(x: np.ndarray) -> np.ndarray:
    """Rounded to float32, which is what a test computes with."""
    return np.asarray(x, np.float32).astype(float)


def _softmax(logits) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def _logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def _mean_over(mask: np.ndarray, term: Callable[..., float]) -> float:
    """The mean of term(row, column) over the entries that the mask marks."""
    terms = [term(b, t) for b, t in np.ndindex(mask.shape) if mask[b, t]]
    return sum(terms) / len(terms)


def _table(mask: np.ndarray, term: Callable[..., float]) -> np.ndarray:
    """term(row, column) where the mask marks, 0 elsewhere."""
    table = np.zeros(mask.shape)
    for b, t in np.ndindex(mask.shape):
        if mask[b, t]:
            table[b, t] = term(b, t)
    return table


# Log-probabilities ----------------------------------------------------------------------------------------------------


def _token_logprobs(rng, tau, extreme=False):
    logits, tokens = _float(rng.normal(0, 2, (3, 4, 6))), rng.integers(0, 6, (3, 4))
    if extreme:
        logits[1:] *= 40
        logits[:, :, 5], tokens = -1e9, tokens % 5
    logprob, entropy = np.zeros((3, 4)), np.zeros((3, 4))
    for b, t in np.ndindex(3, 4):
        scaled = [x / tau for x in logits[b, t]]
        total = max(scaled) + math.log(sum(math.exp(x - max(scaled)) for x in scaled))
        logprob[b, t] = scaled[tokens[b, t]] - total
        entropy[b, t] = -sum(p * math.log(p) for p in _softmax(scaled) if p > 0)
    return {"logits": logits, "tokens": tokens, "tau": tau}, {"logprob": logprob, "entropy": entropy}


_case(_token_logprobs, "token_logprobs_tau_1.0", tau=1.0)
_case(_token_logprobs, "token_logprobs_tau_0.7", tau=0.7)
_case(_token_logprobs, "token_logprobs_extreme", tau=1.0, extreme=True)


def _kl_estimators(rng):
    logp, ref, mask = _float(rng.normal(-2, 1, (4, 6))), _float(rng.normal(-2, 1, (4, 6))), _ragged(rng, 4, 6)
    expected = {}
    for kind, of in {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.exp(-d) - 1 + d,
    }.items():
        expected[kind] = _table(mask, lambda b, t, of=of: of(logp[b, t] - ref[b, t]))
        expected[f"mean_{kind}"] = _mean_over(mask, lambda b, t, kind=kind: expected[kind][b, t])
    return {"logp": logp, "logp_ref": ref, "mask": mask}, expected


_case(_kl_estimators, "kl_estimators")


def _kl_full(rng):
    p, q = _float(rng.normal(0, 2, (2, 2, 3, 5)))
    kl = np.zeros((2, 3))
    for b, t in np.ndindex(2, 3):
        kl[b, t] = sum(x * math.log(x / y) for x, y in zip(_softmax(p[b, t]), _softmax(q[b, t]), strict=True))
    return {"logits_p": p, "logits_q": q}, {"kl": kl}


_case(_kl_full, "kl_full")


# Next token -----------------------------------------------------------------------------------------------------------


def _next_token(rng, split=None):
    logits, tokens = _float(rng.normal(0, 2, (5, 7, 6))), rng.integers(0, 6, (5, 7))
    mask = _ragged(rng, 5, 7)
    mask[1, 0] = 1  # never a target: nothing predicts it
    targets = mask * (np.arange(7) > 0)

    def loss(logits):
        return _mean_over(targets, lambda b, t: -math.log(_softmax(logits[b, t - 1])[tokens[b, t]]))

    expected = {"loss": loss(logits), "grad_logits": _gradient(loss, logits), "n_targets": targets.sum()}
    return {"logits": logits, "tokens": tokens, "loss_mask": mask, "split": split}, expected


_case(_next_token, "next_token_loss")
_case(_next_token, "next_token_loss_microbatches", split=2)


# Preferences ----------------------------------------------------------------------------------------------------------


def _ranked(rng):
    scores, ranks = _float(rng.normal(0, 2, (8, 9))), np.full((8, 9), -1)
    for row, count in zip(ranks, (4, 5, 6, 7, 8, 9, 4, 1), strict=True):
        row[rng.permutation(9)[:count]] = rng.integers(0, count, count)
    ranks[6] = np.minimum(ranks[6], 0)  # all tied: no pair
    pairs = [[(i, j) for i, j in np.ndindex(9, 9) if 0 <= row[i] < row[j]] for row in ranks]

    def loss(scores):
        means = [
            sum(-_logsigmoid(scores[b, i] - scores[b, j]) for i, j in found) / len(found)
            for b, found in enumerate(pairs)
            if found
        ]
        return sum(means) / len(means)

    right = [scores[b, i] > scores[b, j] for b, found in enumerate(pairs) for i, j in found]
    expected = {"loss": loss(scores), "grad_scores": _gradient(loss, scores), "n_pairs": [len(p) for p in pairs]}
    return {"scores": scores, "ranks": ranks}, expected | {"pair_accuracy_pooled": sum(right) / len(right)}


_case(_ranked, "bradley_terry_ranked")


def _pairs(rng, margins=False):
    chosen, rejected = _float(rng.normal(0, 2, (2, 7)))
    chosen[0], rejected[0] = -80.0, 120.75
    chosen[1], rejected[1] = 100.0, -100.0
    chosen[2] = rejected[2] = 1.25
    margin = _float(rng.uniform(0, 1, 7)) if margins else np.zeros(7)

    def loss(chosen, rejected):
        terms = [-_logsigmoid(c - r - m) for c, r, m in zip(chosen, rejected, margin, strict=True)]
        return sum(terms) / len(terms)

    right = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen, rejected, strict=True)]
    return {"chosen": chosen, "rejected": rejected, "margin": margin}, {
        "loss": loss(chosen, rejected),
        "grad_chosen": _gradient(lambda x: loss(x, rejected), chosen),
        "grad_rejected": _gradient(lambda x: loss(chosen, x), rejected),
        "accuracy": sum(right) / 7,
    }


_case(_pairs, "bradley_terry_pairs")
_case(_pairs, "bradley_terry_margin", margins=True)


def _choice(rng):
    scores, chosen = _float(rng.normal(0, 3, (5, 4))), rng.integers(0, 4, 5)

    def loss(scores):
        return sum(-math.log(_softmax(row)[best]) for row, best in zip(scores, chosen, strict=True)) / 5

    return {"scores": scores, "chosen": chosen}, {"loss": loss(scores), "grad_scores": _gradient(loss, scores)}


_case(_choice, "choice_loss")


def _dpo(rng, smoothing=0.0, identity=False):
    beta = 0.3 if identity else 0.15
    policy, ref = _float(rng.normal(-20, 6, (2, 5))), _float(rng.normal(-20, 6, (2, 5)))

    def loss(chosen, rejected):
        terms = []
        for pair in range(5):
            margin = (chosen[pair] - ref[0, pair]) - (rejected[pair] - ref[1, pair])
            if identity:
                terms.append((margin - 1 / (2 * beta)) ** 2)
            else:
                right, wrong = _logsigmoid(beta * margin), _logsigmoid(-beta * margin)
                terms.append(-(1 - smoothing) * right - smoothing * wrong)
        return sum(terms) / 5

    inputs = {"policy_chosen": policy[0], "policy_rejected": policy[1], "ref_chosen": ref[0], "ref_rejected": ref[1]}
    return inputs | {"beta": beta, "label_smoothing": smoothing}, {
        "loss": loss(*policy),
        "grad_policy_chosen": _gradient(lambda x: loss(x, policy[1]), policy[0]),
        "grad_policy_rejected": _gradient(lambda x: loss(policy[0], x), policy[1]),
    }


_case(_dpo, "dpo_label_smoothing_0.0")
_case(_dpo, "dpo_label_smoothing_0.1", smoothing=0.1)
_case(_dpo, "ipo", identity=True)


def _dpo_from_tokens(rng):
    inputs, expected = {"beta": 0.15}, {}
    for which in ("chosen", "rejected"):
        mask = np.maximum(_ragged(rng, 5, 6), np.arange(6) == 1)
        inputs[f"{which}_mask"] = mask
        for model in ("policy", "ref"):
            logp = inputs[f"{model}_{which}"] = _float(rng.normal(-2, 1, (5, 6)))
            sums = [sum(x for x, keep in zip(*row, strict=True) if keep) for row in zip(logp, mask, strict=True)]
            expected[f"{model}_{which}_sum"] = sums
    margins = [
        (expected["policy_chosen_sum"][i] - expected["ref_chosen_sum"][i])
        - (expected["policy_rejected_sum"][i] - expected["ref_rejected_sum"][i])
        for i in range(5)
    ]
    return inputs, expected | {"loss": sum(-_logsigmoid(0.15 * margin) for margin in margins) / 5}


_case(_dpo_from_tokens, "dpo_from_tokens")


# Rewards and advantages -----------------------------------------------------------------------------------------------


def _token_rewards(rng, pad_id=None):
    beta, eos_id = 0.12, 2
    logp, ref = _float(rng.normal(-2, 1, (6, 8))), _float(rng.normal(-2, 1, (6, 8)))
    score, inputs = _float(rng.normal(0, 2, 6)), {}
    mask = _ragged(rng, 6, 8)
    if pad_id is not None:
        tokens = rng.integers(3, 9, (6, 8))
        for row, last in zip(tokens[:-1], (0, 3, 4, 5, 7), strict=True):  # the last row has no EOS
            row[last], row[last + 1 :] = eos_id, pad_id
        tokens[1, 5] = eos_id  # behind the first, which ends the answer
        inputs = {"tokens": tokens, "eos_id": eos_id}
        for row, answer in zip(mask, tokens.tolist(), strict=True):
            end = answer.index(eos_id) if eos_id in answer else 7
            row[:] = [t <= end for t in range(8)]
    last = [max((t for t in range(8) if row[t]), default=-1) for row in mask]
    kl = _table(mask, lambda b, t: logp[b, t] - ref[b, t])
    reward = _table(mask, lambda b, t: -beta * kl[b, t] + (score[b] if t == last[b] else 0.0))
    inputs |= {"logp": logp, "logp_ref": ref, "score": score, "beta": beta}
    if pad_id is None:
        inputs["mask"] = mask
    return inputs, {"kl": kl, "reward": reward, "last_index": last}


_case(_token_rewards, "token_reward_mask")
_case(_token_rewards, "token_reward_eos", pad_id=0)
_case(_token_rewards, "token_reward_eos_pad_is_eos", pad_id=2)


def _gae(rng, gamma, lam):
    reward, value = _float(rng.normal(0, 1, (6, 8))), _float(rng.normal(0, 1, (6, 8)))
    mask, advantage = _ragged(rng, 6, 8), np.zeros((6, 8))
    for b in range(6):
        after, value_after = 0.0, 0.0
        for t in reversed(range(8)):
            if mask[b, t]:
                after = reward[b, t] + gamma * value_after - value[b, t] + gamma * lam * after
                advantage[b, t], value_after = after, value[b, t]
    inputs = {"reward": reward, "value": value, "mask": mask, "gamma": gamma, "lam": lam}
    return inputs, {"advantage": advantage, "return": _table(mask, lambda b, t: advantage[b, t] + value[b, t])}


_case(_gae, "gae_gamma_1.0_lambda_0.95", gamma=1.0, lam=0.95)
_case(_gae, "gae_gamma_1.0_lambda_1.0", gamma=1.0, lam=1.0)
_case(_gae, "gae_gamma_0.9_lambda_0.95", gamma=0.9, lam=0.95)


def _whiten(rng, shift_mean, scale=1.0, single=False):
    x, mask = _float(rng.normal(0.5, 2, (6, 8)) * scale), _ragged(rng, 6, 8)
    if single:
        mask[1:] = 0
    mean = _mean_over(mask, lambda b, t: x[b, t])
    variance = _mean_over(mask, lambda b, t: (x[b, t] - mean) ** 2)
    back = 0.0 if shift_mean else mean
    whitened = _table(mask, lambda b, t: (x[b, t] - mean) / math.sqrt(variance + 1e-8) + back)
    return {"x": x, "mask": mask, "shift_mean": shift_mean}, {"whitened": whitened}


for _shift, _name in ((True, "shift"), (False, "keep_mean")):
    _case(_whiten, f"whiten_{_name}", shift_mean=_shift)
    _case(_whiten, f"whiten_small_variance_{_name}", shift_mean=_shift, scale=5e-5)
    _case(_whiten, f"whiten_single_valid_{_name}", shift_mean=_shift, single=True)


def _group(rng, ddof=None):
    reward, advantage = _float(rng.normal(0, 2, (4, 5))), np.zeros((4, 5))
    reward[2] = 1.5  # constant: no advantage
    for group, i in np.ndindex(4, 5):
        row = reward[group].tolist()
        if ddof is None:
            advantage[group, i] = row[i] - (sum(row) - row[i]) / 4
        else:
            std = math.sqrt(sum((r - sum(row) / 5) ** 2 for r in row) / (5 - ddof))
            advantage[group, i] = (row[i] - sum(row) / 5) / (std + 1e-4)
    return {"reward": reward, "ddof": ddof, "eps": 1e-4}, {"advantage": advantage}


_case(_group, "grpo_advantage_population_std", ddof=0)
_case(_group, "grpo_advantage_sample_std", ddof=1)
_case(_group, "rloo_advantage")


def _normalise(rng, given):
    raw = _float(rng.normal(3, 2, 9))
    mean, target_mean, target_std = sum(raw) / 9, 0.25, 1.5
    std = math.sqrt(sum((r - mean) ** 2 for r in raw) / 9)
    inputs = {"raw": raw, "target_mean": target_mean, "target_std": target_std}
    if given:
        mean, std = 1.73, 2.41
        inputs |= {"mean": mean, "std": std}
    return inputs, {"normalised": [(r - mean) / std * target_std + target_mean for r in raw]}


_case(_normalise, "reward_normalise_given", given=True)
_case(_normalise, "reward_normalise_samples", given=False)


# PPO ------------------------------------------------------------------------------------------------------------------


def _ratios(rng):
    """Log-probabilities, old ones, advantages and a mask; ratios outside of the clip under both signs of advantage."""
    old, mask = _float(rng.normal(-2, 1, (6, 8))), _ragged(rng, 6, 8)
    return _float(old + rng.normal(0, 0.4, (6, 8))), old, _float(rng.normal(0, 1, (6, 8))), mask


def _policy(rng, first=False, overflow=False):
    logp, old, advantage, mask = _ratios(rng)
    eps = 0.2
    if first:
        logp = old.copy()
    if overflow:
        logp = np.where(mask, logp, _float(old + 200))

    def surrogate(logp, b, t, clipped):
        ratio = math.exp(logp[b, t] - old[b, t])
        return -advantage[b, t] * (min(max(ratio, 1 - eps), 1 + eps) if clipped else ratio)

    def loss(logp):
        return _mean_over(mask, lambda b, t: max(surrogate(logp, b, t, False), surrogate(logp, b, t, True)))

    expected = {
        "loss": loss(logp),
        # On the first step the ratio is 1, within the clip.
        "grad_logp": _gradient(loss, logp),
        "clip_fraction": _mean_over(mask, lambda b, t: surrogate(logp, b, t, True) > surrogate(logp, b, t, False)),
        "approx_kl": _mean_over(mask, lambda b, t: (logp[b, t] - old[b, t]) ** 2 / 2),
    }
    return {"logp": logp, "logp_old": old, "advantage": advantage, "mask": mask, "eps": eps}, expected


_case(_policy, "ppo_policy_loss")
_case(_policy, "ppo_policy_first_step", first=True)
_case(_policy, "ppo_policy_padding_overflow", overflow=True)


def _penalty(rng):
    logp, old, advantage, mask = _ratios(rng)
    beta = 0.45

    def kl(logp, b, t):
        return math.exp(logp[b, t] - old[b, t]) - 1 - (logp[b, t] - old[b, t])

    def loss(logp):
        return _mean_over(
            mask, lambda b, t: -advantage[b, t] * math.exp(logp[b, t] - old[b, t]) + beta * kl(logp, b, t)
        )

    expected = {"loss": loss(logp), "grad_logp": _gradient(loss, logp)}
    expected["kl"] = _mean_over(mask, lambda b, t: kl(logp, b, t))
    return {"logp": logp, "logp_old": old, "advantage": advantage, "mask": mask, "beta": beta}, expected


_case(_penalty, "ppo_penalty_loss")


def _value(rng):
    value, old, target, mask = *_float(rng.normal(0, 1, (3, 6, 8))), _ragged(rng, 6, 8)
    eps = 0.25

    def error(value, b, t, clipped):
        predicted = min(max(value[b, t], old[b, t] - eps), old[b, t] + eps) if clipped else value[b, t]
        return (predicted - target[b, t]) ** 2

    def loss(value):
        return _mean_over(mask, lambda b, t: max(error(value, b, t, False), error(value, b, t, True)) / 2)

    expected = {"loss": loss(value), "grad_value": _gradient(loss, value)}
    expected["clip_fraction"] = _mean_over(mask, lambda b, t: error(value, b, t, True) > error(value, b, t, False))
    return {"value": value, "value_old": old, "return": target, "mask": mask, "eps_v": eps}, expected


_case(_value, "ppo_value_loss")


def _kl_controller(rng, n):
    kl, coef, target, horizon, history = rng.uniform(-1, 12, 6).round(2), 0.2, 6.0, 10000, []
    for each, count in zip(kl, n, strict=True):
        coef *= 1 + min(max(each / target - 1, -0.2), 0.2) * count / horizon
        history.append(coef)
    inputs = {"beta_init": 0.2, "target": target, "horizon": horizon, "kl": kl, "n": list(n)}
    return inputs, {"beta": history}


_case(_kl_controller, "kl_controller", n=(256,) * 6)
_case(_kl_controller, "kl_controller_varying_n", n=(64, 512, 1, 2048, 96, 300))


# Schedules and curves -------------------------------------------------------------------------------------------------


def _cosine(rng, peak, warmup, total):
    steps = sorted({0, 1, max(warmup - 1, 0), warmup, warmup + 1, (warmup + total) // 2, total - 1, total, total + 9})
    rates = []
    for step in steps:
        done = min(1.0, (step - warmup) / (total - warmup))
        decayed = peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
        rates.append(peak * step / warmup if step < warmup else decayed)
    return {"peak": peak, "warmup": warmup, "total": total, "final_fraction": 0.1, "step": steps}, {"lr": rates}


_case(_cosine, "lr_cosine_warmup", peak=9.65e-6, warmup=10, total=110)
_case(_cosine, "lr_cosine_no_warmup", peak=1.5e-3, warmup=0, total=64)


def _best_of_n_kl(rng):
    n = [1, 2, 3, 4, 8, 16, 64, 256, 1024]
    return {"n": n}, {"kl": [math.log(x) - (x - 1) / x for x in n]}


_case(_best_of_n_kl, "best_of_n_kl")


def _gao(rng, curve, fit=False):
    a, b = 1.3, 0.11
    d = np.linspace(0 if not fit else 0.2, 6, 14 if fit else 8)
    features = [(x, -x * x if curve == "bon" else -x * math.log(x) if x > 0 else 0.0) for x in d]
    reward = np.array([a * linear + b * bend for linear, bend in features])
    if not fit:
        return {"d": d, "a": a, "b": b}, {"reward": reward}
    reward = reward + rng.normal(0, 0.1, len(d))
    # The normal equations of two coefficients.
    xx = sum(x * x for x, _ in features)
    xy = sum(x * y for x, y in features)
    yy = sum(y * y for _, y in features)
    rx = sum(r * x for r, (x, _) in zip(reward, features, strict=True))
    ry = sum(r * y for r, (_, y) in zip(reward, features, strict=True))
    a, b = (rx * yy - ry * xy) / (xx * yy - xy * xy), (ry * xx - rx * xy) / (xx * yy - xy * xy)
    rss = sum((r - a * x - b * y) ** 2 for r, (x, y) in zip(reward, features, strict=True))
    return {"d": d, "reward": reward}, {"a": a, "b": b, "rss": rss}


for _curve in ("bon", "rl"):
    _case(_gao, f"gao_{_curve}", curve=_curve)
    _case(_gao, f"gao_{_curve}_fit", curve=_curve, fit=True)


# Agreement ------------------------------------------------------------------------------------------------------------


def _fleiss(counts) -> float:
    raters, total = sum(counts[0]), sum(map(sum, counts))
    observed = sum(sum(n * (n - 1) for n in row) / (raters * (raters - 1)) for row in counts) / len(counts)
    chance = sum((sum(row[j] for row in counts) / total) ** 2 for j in range(len(counts[0])))
    return (observed - chance) / (1 - chance)


def _fleiss_counts(rng):
    counts = [np.bincount(rng.integers(0, 4, 5) % rng.integers(1, 5), minlength=4).tolist() for _ in range(7)]
    return {"counts": counts}, {"kappa": _fleiss(counts)}


_case(_fleiss_counts, "fleiss_kappa_counts")


def _rankings(rng, people):
    ranks, counts, agreed = [], [], {True: [], False: []}  # with ties counted, and without
    for raters, responses in zip(people, (4, 5, 3), strict=True):
        truth = rng.permutation(responses)
        ranks.append([np.clip(truth + rng.integers(-1, 2, responses), 0, None).tolist() for _ in range(raters)])
        for i, j in np.ndindex(responses, responses):
            if i < j:
                labels = [(r[i] > r[j]) - (r[i] < r[j]) for r in ranks[-1]]
                counts.append([labels.count(-1), labels.count(1), labels.count(0)])
                pairs = [(labels[x], labels[y]) for x in range(raters) for y in range(x)]
                agreed[True] += [x == y for x, y in pairs]
                agreed[False] += [x == y for x, y in pairs if x and y]
    expected = {
        "agreement_with_ties": sum(agreed[True]) / len(agreed[True]),
        "agreement_without_ties": sum(agreed[False]) / len(agreed[False]),
    }
    if len(set(people)) == 1:
        expected["kappa"] = _fleiss(counts)
    return {"ranks": ranks}, expected


_case(_rankings, "annotator_rankings", people=(3, 3, 3))
_case(_rankings, "annotator_rankings_varying", people=(2, 4, 3))
