"""PPO and A2C on the dot-product environment: a tiny world is solved; whole episodes, resuming, files, commands."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ppo_a2c
from gemsjax.envs.dot_product import EnvConfig, make_params
from gemsjax.errors import DataError, SettingError, TrainingError
from gemsjax.on_policy import A2CConfig, Config, ModelConfig, PPOConfig, TrainConfig, check_config, driver, files
from gemsjax.on_policy.evaluation import METRICS, play, reference_returns
from gemsjax.on_policy.training import make_learning

QUICK = {"xla_backend_optimization_level": 0}
SMALL = ModelConfig((32,), (32,))
FOUR = EnvConfig(num_items=4, num_users=4, state_dim=8, user_feature_dim=4, item_feature_dim=4, fixed_users=True)
PROBE = Config(
    env=FOUR,
    model=SMALL,
    ppo=PPOConfig(lr=3e-3, n_steps=512, batch_size=64, update_epochs=4),
    a2c=A2CConfig(lr=5e-3, num_envs=16, max_grad_norm=1e3),
)
ITERATIONS = {"ppo": 20, "a2c": 500}
USERS = jax.random.key(9)


@cache
def solved(algorithm):
    """Mean greedy and sampled returns after training on four users who each like one of four items; the metrics."""
    learning = make_learning(
        dataclasses.replace(PROBE, algorithm=algorithm), make_params(FOUR, USERS, np.eye(4), np.eye(4))
    )

    def train(key):
        run = learning.start(key)
        state, metrics = learning.iterate(run, learning.init(run), jnp.arange(ITERATIONS[algorithm]))
        ways = (play(learning.env, learning.act(state.params, way), run.env_params, USERS, 40) for way in (True, False))
        return [rewards.sum(axis=1).mean() for rewards in ways], metrics

    returns, metrics = jax.jit(train, compiler_options=QUICK)(jax.random.key(0))
    return [float(value) for value in returns], jax.tree.map(np.asarray, metrics)


@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_the_best_item_of_each_user_is_found(algorithm):
    """The optimum is known: 26.554678, each user's own item in all 20 turns. One item for all is worth 12.9."""
    optimum = 26.554678
    params = make_params(FOUR, USERS, np.eye(4), np.eye(4))
    found = reference_returns(make_learning(PROBE).env, params, USERS, 40)
    np.testing.assert_allclose(found["best-item"], optimum, atol=1e-4)
    assert float(found["same-item"].mean()) < 0.6 * optimum
    (greedy, sampled), metrics = solved(algorithm)
    assert greedy >= 0.97 * optimum and sampled >= 0.9 * optimum
    assert metrics["finite"].all() and all(np.isfinite(value).all() for value in metrics.values())
    assert metrics["entropy"][0] > 1.3 and metrics["entropy"][-1] < 0.7 * metrics["entropy"][0]


# -- whole episodes ----------------------------------------------------------------------------------------------------

ONE = EnvConfig(
    num_items=1, num_users=1, state_dim=2, user_feature_dim=1, item_feature_dim=1, fixed_users=True,
    max_episode_steps=4, reward_decay=1.0, drift=0.5,
)  # fmt: skip


@pytest.mark.parametrize("end", ["terminal", "truncated"])
def test_episodes_end_start_anew_and_bootstrap_as_configured(end):
    """One user, one item: rewards 1, 1.5, 2, 2.5, in two environments, through rollouts of three turns."""
    env = dataclasses.replace(ONE, horizon_end=end)
    config = Config("a2c", env=env, model=SMALL, a2c=A2CConfig(n_steps=3, num_envs=2, gae_lambda=0.0, lr=0.0))
    learning = make_learning(config, make_params(env, USERS, np.ones((1, 1)), np.ones((1, 1))))
    loop = learning.init.__self__
    run = learning.start(USERS)
    roll_out = jax.jit(lambda state, key: loop._roll_out(run, state, key), compiler_options=QUICK)
    state = learning.init(run)
    assert not state.episodes.any()
    state, first, ended = roll_out(state, jax.random.key(1))
    assert float(ended[1]) == 0
    state, second, ended = roll_out(state, jax.random.key(2))
    assert (float(ended[0]), float(ended[1])) == (14.0, 2.0)
    np.testing.assert_array_equal(state.episodes, [1, 1])
    np.testing.assert_allclose([state.latest[name][0] for name in METRICS], [7.0, 1.75, 2.5, 1.0, np.sqrt(0.3125)])
    users = np.concatenate([first.observation, second.observation])[:, 0]
    np.testing.assert_allclose(users[:, 0], [1.0, 1.5, 2.0, 2.5, 1.0, 1.5])
    np.testing.assert_allclose(users[:, 1], [0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    after = float(loop.value(state.params, jnp.array([3.0, 1.0])))  # what the ended episode's last observation is worth
    np.testing.assert_allclose(second.target[0], 2.5 + (0.99 * after if end == "truncated" else 0.0), atol=1e-5)
    inside = loop.value(state.params, jnp.array([1.5, 1.0]))
    np.testing.assert_allclose(second.target[1], 1.0 + 0.99 * inside, atol=1e-5)


# -- the driver --------------------------------------------------------------------------------------------------------

TINY = Config(
    algorithm="a2c",
    env=dataclasses.replace(FOUR, fixed_users=False, max_episode_steps=6),
    model=ModelConfig((8,), (8,), "elu"),
    a2c=A2CConfig(n_steps=4, num_envs=3),
    ppo=PPOConfig(n_steps=12, num_envs=3, batch_size=6, update_epochs=2),
)


def tiny(root, turns, **changes):
    train = TrainConfig(turns, 24, 48, 48, str(root / "logs"), str(root / "checkpoints"), seed=5, eval_episodes=8)
    return dataclasses.replace(TINY, train=train, **changes)


class Runs(NamedTuple):
    """A run of 96 turns in one go, and one that was stopped after 48; where, and what they came to."""

    algorithm: str
    whole: Path
    parts: Path
    one: driver.Outcome
    two: driver.Outcome

    def config(self, turns, **changes):
        return tiny(self.whole, turns, algorithm=self.algorithm, **changes)


@pytest.fixture(scope="module", params=["a2c", "ppo"])
def runs(request, tmp_path_factory):
    whole, parts = (tmp_path_factory.mktemp(name) for name in ("whole", "parts"))
    one = driver.train(tiny(whole, 96, algorithm=request.param), quiet=True)
    driver.train(tiny(parts, 48, algorithm=request.param), quiet=True)
    two = driver.train(tiny(parts, 96, algorithm=request.param), resume=True, quiet=True)
    return Runs(request.param, whole, parts, one, two)


def test_a_resumed_run_is_the_same(runs):
    algorithm, whole, parts, one, two = runs
    assert one.finished and two.finished and one.step == two.step == 96
    for left, right in zip(jax.tree.leaves(one.state), jax.tree.leaves(two.state), strict=True):
        np.testing.assert_array_equal(left, right)
    for name in (f"{algorithm}.csv", f"{algorithm}.log", f"{algorithm}_eval.csv"):
        assert (whole / "logs" / name).read_text() == (parts / "logs" / name).read_text()


def test_the_log_is_lines_and_a_table(runs):
    directory = runs.whole / "logs"
    with open(directory / f"{runs.algorithm}.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [24, 48, 72, 96]
    names = {"loss", "policy_loss", "value_loss", "entropy", "return", "env_0/total_reward", "env_2/std_reward"}
    assert names <= rows[0].keys() and ("clipped_share" in rows[0]) == (runs.algorithm == "ppo")
    lines = (directory / f"{runs.algorithm}.log").read_text().splitlines()
    assert len(lines) == 4 and lines[1].startswith("[Step 48] ")
    shown = dict(pair.split("=") for pair in lines[1].removeprefix("[Step 48] ").split(" | "))
    assert all(float(shown[name]) == pytest.approx(float(rows[1][name]), abs=6e-5) for name in names)


def test_a_checkpoint_holds_the_item_table_and_plays_alone(runs):
    one = runs.one
    loaded = files.load(files.place(runs.config(96)))
    assert loaded.step == 96 and loaded.config.algorithm == runs.algorithm and loaded.config.env == TINY.env
    assert loaded.config.method == runs.config(96).method
    assert loaded.config.model == TINY.model
    np.testing.assert_array_equal(loaded.run.env_params.items, one.run.env_params.items)
    ours, theirs = (driver.judged(c, r, s.params, 8, True) for c, r, s in (
        (runs.config(96), one.run, one.state), (loaded.config, loaded.run, loaded.state)))  # fmt: skip
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (8, 6)


def test_what_a_run_may_not_go_on_with(runs, tmp_path):
    with pytest.raises(SettingError, match="--resume"):
        driver.train(runs.config(96), quiet=True)
    with pytest.raises(SettingError, match="total_timesteps = 48 .* 96"):
        driver.train(runs.config(48), resume=True, quiet=True)
    other = dataclasses.replace(runs.config(96).method, gamma=0.5)
    with pytest.raises(DataError, match=f"{runs.algorithm}.gamma is 0.99 there and 0.5 here"):
        driver.train(runs.config(96, **{runs.algorithm: other}), resume=True, quiet=True)
    with pytest.raises(DataError, match="holds no usable checkpoint"):
        files.load(tmp_path)


def test_a_resumed_run_keeps_to_the_tables_that_it_began_with(runs):
    tables = runs.one.run.env_params
    assert driver.train(runs.config(96), resume=True, params=tables, quiet=True).step == 96
    for other in (tables.replace(drift=tables.drift + 1.0), tables.replace(items=tables.items[::-1])):
        with pytest.raises(SettingError, match="params = 'other tables' .* those of the checkpoint"):
            driver.train(runs.config(96), resume=True, params=other, quiet=True)


def test_the_log_of_an_earlier_run_is_not_written_over(runs, tmp_path):
    config = runs.config(48)
    elsewhere = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoint_dir=str(tmp_path)))
    table = runs.whole / "logs" / f"{runs.algorithm}.csv"
    before = table.read_text()
    with pytest.raises(SettingError, match="log_dir = .* another directory"):
        driver.train(elsewhere, quiet=True)
    assert table.read_text() == before and not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_passed_over(runs, tmp_path):
    copy = tmp_path / "checkpoints"
    shutil.copytree(files.place(runs.config(96)), copy)
    largest = max((copy / "step_00000096" / "arrays").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1  # of the same size, so that only its hash tells
    largest.write_bytes(content)
    with pytest.warns(UserWarning, match="going back to the checkpoint of step 48: .* was altered"):
        loaded = files.load(copy)
    assert loaded.step == 48 and loaded.config.method == runs.config(96).method
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loaded.state))


def test_a_weight_that_is_no_number_stops_training(tmp_path):
    config = tiny(tmp_path, 48)
    params = make_params(config.env, USERS)
    with pytest.raises(TrainingError, match="no longer finite"):
        driver.train(config, params=params.replace(drift=jnp.float32(jnp.nan)), quiet=True)
    assert not list(files.place(config).glob("step_*"))


def test_a_logger_keeps_its_keys_and_leaves_out_what_is_missing(tmp_path, capsys):
    logger = files.Logger(tmp_path, "x")
    assert logger.log(3, {"a": 0.5, "b": None, "c": float("nan")}) == "[Step 3] a=0.5000"
    assert capsys.readouterr().out == "[Step 3] a=0.5000\n"
    with pytest.raises(SettingError, match="those of the first: a, b, c"):
        logger.log(4, {"a": 1.0})
    files.Logger(tmp_path, "x", after=3).log(5, {"a": 1.0, "b": 2.0, "c": 3.0})
    assert (tmp_path / "x.csv").read_text() == "step,a,b,c\n3,0.5,,\n5,1.0,2.0,3.0\n"
    files.Logger(tmp_path, "x")
    assert (tmp_path / "x.csv").read_text() == (tmp_path / "x.log").read_text() == ""
    (tmp_path / "y.csv").write_text("other,a\n1,2\n")
    with pytest.raises(DataError, match="no table of a run"):
        files.Logger(tmp_path, "y", after=3)


# -- settings and commands ---------------------------------------------------------------------------------------------


def test_defaults_are_the_documented_ones():
    ppo, a2c, train = PPOConfig(), A2CConfig(), TrainConfig()
    assert (ppo.lr, ppo.gamma, ppo.gae_lambda, ppo.clip_eps, ppo.ent_coef, ppo.vf_coef) == (
        3e-4, 0.99, 0.95, 0.2, 0.01, 0.5)  # fmt: skip
    assert (ppo.max_grad_norm, ppo.update_epochs, ppo.batch_size, ppo.n_steps, ppo.num_envs) == (0.5, 10, 64, 2048, 8)
    assert (a2c.lr, a2c.gamma, a2c.ent_coef, a2c.vf_coef, a2c.max_grad_norm, a2c.n_steps, a2c.gae_lambda) == (
        7e-4, 0.99, 0.01, 0.5, 0.5, 5, 0.95)  # fmt: skip
    assert (train.total_timesteps, train.log_interval, train.eval_interval, train.save_interval) == (
        100_000, 1_000, 10_000, 50_000)  # fmt: skip
    assert (train.log_dir, train.checkpoint_dir, train.seed) == ("logs", "checkpoints", 42)
    assert (Config().algorithm, Config().device, Config().rollout) == ("ppo", "auto", (256, 8))
    assert ModelConfig() == ModelConfig((128, 64), (128, 64), "tanh")
    assert ppo_a2c.Train().config() == Config()


def test_the_model_is_as_configured():
    config = dataclasses.replace(TINY, model=ModelConfig((5, 7), (3,), "relu"))
    learning = make_learning(config)
    state = jax.eval_shape(learning.init, jax.eval_shape(learning.start, USERS))
    shapes = {part: [layer["kernel"].shape for layer in getattr(state.params, part)["trunk"].values()]
              for part in ("actor", "critic")}  # fmt: skip
    assert shapes == {"actor": [(8, 5), (5, 7), (7, 4)], "critic": [(8, 3), (3, 1)]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--algo", "pppo"], "algorithm = 'pppo' .* a2c, ppo .*did you mean 'ppo'"),
        (["--algo", "sac"], "--algo = 'sac' .* a2c, both, ppo"),
        (["evaluate", "--checkpoint", "x", "--algo", "dqn"], "--algo = 'dqn' .* a2c, ppo"),
        (["evaluate", "--checkpoint", "x", "--episodes", "0"], "--episodes = 0 .* at least 1"),
        (["--budget", "smal"], "did you mean 'small'"),
        (["train", "--ppo.batch-size", "100"], "batch_size = 100 .* divisor of n_steps = 2048"),
        (["train", "--ppo.num-envs", "7"], "num_envs = 7 .* divisor"),
        (["train", "--model.activation", "gelu"], "activation = 'gelu' .* elu, relu, tanh"),
        (["train", "--env.state-dim", "60"], "state_dim = 60"),
        (["train", "--ppo.clip-eps", "nan"], "clip_eps = nan"),
        (["train", "--algo", "a2c", "--a2c.returns", "ga"], "did you mean 'gae'"),
        (["train", "--total-timesteps", "0"], "total_timesteps = 0"),
        (["train", "--device", "abacus"], "device = 'abacus' .* auto, cpu"),
    ],
)
def test_refused_with_what_is_accepted(words, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "train", lambda *_, **__: pytest.fail("it was not refused"))
    with pytest.raises(SettingError, match=says):
        ppo_a2c.main(words)
    assert not list(tmp_path.iterdir())


def test_an_unknown_algorithm_is_a_value_error():
    with pytest.raises(ValueError, match="choose one of a2c, ppo"):
        check_config(Config(algorithm="reinforce"))


def test_the_evaluation_command(runs, capsys):
    place, other = str(files.place(runs.config(96))), {"a2c": "ppo", "ppo": "a2c"}[runs.algorithm]
    words = ["evaluate", "--algo", runs.algorithm, "--checkpoint", place, "--episodes", "8"]
    ppo_a2c.main(words)
    drawn = capsys.readouterr().out
    ppo_a2c.main([*words, "--greedy"])
    greedy = capsys.readouterr().out
    assert drawn.count("\nepisode ") == 7 and "96 turns of training, stochastic" in drawn and "greedy" in greedy
    for name in METRICS:
        assert f"  {name}: " in drawn
    with pytest.raises(SettingError, match=f"that of the checkpoint, {runs.algorithm}"):
        ppo_a2c.main(["evaluate", "--algo", other, "--checkpoint", place])


def test_the_comparison_writes_and_keeps_its_records(tmp_path, monkeypatch):
    monkeypatch.setitem(ppo_a2c.BUDGETS, "smoke", ppo_a2c.Budget(timesteps=48, seeds=2, episodes=8))
    monkeypatch.setattr(ppo_a2c, "WORLDS", {"10 items": TINY.env})
    monkeypatch.setattr(ppo_a2c, "VARIANTS", {"A2C": ("a2c", "gae")})
    words = ["--budget", "smoke", "--out", str(tmp_path / "out")]
    ppo_a2c.main(words)
    record = json.loads((tmp_path / "out" / "records" / "A2C_10_items_seed42.json").read_text())
    assert record["turns"] == 50 and record["references"]["best-item"] > record["greedy"] - 1e-4
    table = (tmp_path / "out" / "ppo_a2c.md").read_text()
    assert "A2C" in table and "100.0 ± 0.0 %" in table and "nan" not in table
    assert "an episode of 6 turns after 50 turns of training, rounded up to whole rollouts (to 50 at most)" in table
    assert (tmp_path / "out" / "learning_curves.png").stat().st_size > 1_000
    with pytest.raises(SettingError, match="--resume"):
        ppo_a2c.main(words)
    monkeypatch.setattr(ppo_a2c, "perform", lambda _: pytest.fail("its record was there"))
    ppo_a2c.main([*words, "--resume"])
    with pytest.raises(DataError, match="config.env.drift is 0.05 there and 0.1 here"):
        monkeypatch.setattr(ppo_a2c, "WORLDS", {"10 items": dataclasses.replace(TINY.env, drift=0.1)})
        ppo_a2c.main([*words, "--resume"])


def a_record(variant, seed, turns, greedy, sampled):
    references = {"random": 0.0, "same-item": 1.0, "best-item": 10.0}
    return {
        "world": "w", "variant": variant, "seed": seed, "turns": turns, "greedy": greedy, "sampled": sampled,
        "references": references, "config": {"env": {"max_episode_steps": 20}},
    }  # fmt: skip


def test_the_report_pairs_what_is_of_one_seed():
    """PPO's returns lie 1, 2 and 3 above A2C's: t = 2 sqrt(3), t(2, 0.975) = 4.302653; drawn, they lie 1 below."""
    records = [a_record("PPO", seed, 104, seed + 3.0, 1.0) for seed in (1, 2, 3)]
    records += [a_record("A2C", seed, 100, 3.0, 2.0) for seed in (1, 2, 3)]
    rows = {(row["returns"], row["policy"], row["less"]): row for row in ppo_a2c.comparisons(records)}
    greedy, drawn = rows["greedy", "PPO", "A2C"], rows["drawn", "PPO", "A2C"]
    assert greedy["difference"] == 2.0 and greedy["high"] - 2.0 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert greedy["p"] == pytest.approx(1 - np.sqrt(12 / 14), abs=1e-9)
    assert (drawn["difference"], drawn["p"]) == (-1.0, 0.0)
    table = ppo_a2c.markdown(records, "about")
    assert "after 100 turns of training, rounded up to whole rollouts (to 104 at most)" in table
    assert "| w | PPO | 5.00 ± 2.48 | 1.00 ± 0.00 | 50.0 ± 24.8 % |" in table
    assert "not corrected for how many" in table
