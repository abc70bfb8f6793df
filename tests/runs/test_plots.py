import json

import matplotlib.image
import numpy as np
import pytest

from rlhf_jax.runs import plots
from rlhf_jax.types import InputError


def write(directory, rows):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, to look at their contents."""
    saved = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


def line(axis, label):
    """The points of the curve whose legend entry is `label`."""
    color = next(one.get_color() for one in axis.lines if one.get_label() == label)
    return next(one.get_xydata().tolist() for one in axis.lines if one.get_color() == color)


def test_curves_draws_the_metrics_asked_for(tmp_path, figures):
    write(
        tmp_path,
        [
            {"step": 1, "time": 0, "loss/policy": 0.5, "loss/value": 2.0, "kl": 0.25},
            {"step": 2, "time": 0, "loss/policy": None, "loss/value": 1.5},
            {"step": 4, "time": 0, "loss/policy": 0.25, "loss/value": 1.0, "kl": 0.75},
        ],
    )
    panels = {"KL to the reference (nats)": ["kl"], "loss": ["loss/policy", "loss/value"], "nothing": ["absent"]}
    path = plots.curves(tmp_path, panels)
    assert path == tmp_path / "curves.png"
    assert matplotlib.image.imread(path).std() > 0.01
    left, right = figures[0].axes
    assert left.get_title(loc="left") == "KL to the reference (nats)"
    assert left.get_legend() is None
    assert line(left, "kl") == [[1, 0.25], [4, 0.75]]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["policy", "value"]
    assert line(right, "policy") == [[1, 0.5], [4, 0.25]]
    assert right.get_xlabel() == "step"


def test_curves_by_default_is_a_panel_a_prefix(tmp_path, figures):
    write(tmp_path, [{"step": i, "time": 0, "loss/a": 0.1 * i, "grad_norm": 2.0, "loss/b": 1.0} for i in range(1, 4)])
    plots.curves(tmp_path)
    assert [axis.get_title(loc="left") for axis in figures[0].axes] == ["loss", "grad_norm"]


def test_long_curves_have_a_running_mean(tmp_path, figures):
    noise = np.tile([1.0, -1.0], 200)
    write(tmp_path, [{"step": i, "time": 0, "kl": 0.5 + noise[i]} for i in range(400)])
    plots.curves(tmp_path)
    raw, mean, _ = figures[0].axes[0].lines
    assert np.ptp(raw.get_ydata()) == 2.0
    np.testing.assert_allclose(mean.get_ydata(), 0.5, atol=1e-12)
    assert mean.get_xdata()[0] == pytest.approx(9.5)


def test_stages_labels_each_bar(tmp_path, figures):
    panels = {
        "gold score (0 to 1)": {"base": 0.2134, "SFT": 0.48, "PPO": 0.71},
        "KL to SFT (nats)": {"SFT": 0.0, "PPO": 11.25},
    }
    path = plots.stages(tmp_path / "plots" / "stages.png", panels)
    assert matplotlib.image.imread(path).std() > 0.01
    left, right = figures[0].axes
    assert [bar.get_height() for bar in left.patches] == [0.2134, 0.48, 0.71]
    assert [text.get_text() for text in left.texts] == ["0.213", "0.48", "0.71"]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["SFT", "PPO"]


def test_no_records(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        plots.curves(tmp_path)


def test_lines_are_drawn_in_the_order_of_x(tmp_path, figures):
    series = {"PPO": [(2.0, 1.0), (0.0, 0.5), (1.0, 2.0)], "best of n": [(0.0, 1.0)]}
    path = plots.lines(tmp_path / "new" / "lines.png", {"gold": series}, x="KL (nats)")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axis,) = figures[0].axes
    assert line(axis, "PPO") == [[0.0, 0.5], [1.0, 2.0], [2.0, 1.0]]
    assert axis.get_xlabel() == "KL (nats)" and axis.get_title(loc="left") == "gold"
    assert all(tick == round(tick) for tick in axis.get_xticks())  # as are the points
    plots.lines(path, {"gold": {"PPO": [(0.0, 1.0), (1.5, 2.0)]}}, x="KL (nats)")
    assert any(tick != round(tick) for tick in figures[1].axes[0].get_xticks())


def test_spreads_are_drawn_around_the_values(tmp_path, figures):
    plots.lines(tmp_path / "a.png", {"gold": {"PPO": [(0.0, 1.0, 0.5), (2.0, 3.0, 0.25)], "DPO": [(1.0, 1.0)]}}, x="d")
    (axis,) = figures[0].axes
    (area,) = axis.collections
    edge = {tuple(point) for point in area.get_paths()[0].vertices.tolist()}
    assert edge == {
        (0, 0.5),
        (0, 1.5),
        (2, 2.75),
        (2, 3.25),
    }
    plots.stages(tmp_path / "b.png", {"gold": {"SFT": 0.5, "PPO": 0.75}}, {"gold": {"SFT": 0.125, "PPO": 0.25}})
    (axis,) = figures[1].axes
    ends = [segment[:, 1].tolist() for segment in axis.containers[0].lines[2][0].get_segments()]
    assert ends == [[0.375, 0.625], [0.5, 1.0]]


def test_series_are_named_once(tmp_path, figures):
    points = [(0.0, 1.0), (1.0, 2.0)]
    same, other = {"PPO": points, "DPO": points}, {"PPO": points, "SFT": points}
    plots.lines(tmp_path / "a.png", {"gold": same, "proxy": same, "loss": other}, x="d")
    assert [axis.get_legend() is not None for axis in figures[0].axes] == [True, False, True]


def test_an_arena_has_strengths_and_win_rates(tmp_path, figures):
    strengths = {"ppo": (0.7, 0.2), "sft": (-0.7, 0.3), "random": None}
    rates = {"ppo": {"sft": 0.8, "random": 1.0}, "sft": {"ppo": 0.2}, "random": {"ppo": 0.0}}
    path = plots.arena(tmp_path / "arena.png", strengths, rates, "40 votes")
    assert matplotlib.image.imread(path).std() > 0.01
    left, right = figures[0].axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["ppo", "sft", "random"]
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first on top
    assert [text.get_text() for text in left.texts] == ["not finite"] and left.texts[0].get_position()[1] == 2
    bars = [[line.get_xdata().tolist() for line in one.lines[1]] for one in left.containers]
    np.testing.assert_allclose(bars, [[[0.5], [0.9]], [[-1.0], [-0.4]]])
    assert {text.get_position(): text.get_text() for text in right.texts} == {
        (1, 0): "80",
        (2, 0): "100",
        (0, 1): "20",
        (0, 2): "0",
    }


def test_an_arena_without_a_vote_is_drawn(tmp_path):
    assert plots.arena(tmp_path / "arena.png", {"a": None, "b": None}, {}).is_file()
