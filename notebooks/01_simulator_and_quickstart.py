# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The simulator, and SAC+GeMS in three minutes
#
# **Part one** plays one simulated user by hand, turn by turn, and draws what happens inside it: interests, boredom,
# clicks. **Part two** trains SAC+GeMS from nothing until it beats the short-term oracle, with the same pieces and sizes
# as `python -m experiments.quickstart`, and looks at what it learned.
#
# The whole notebook takes three to four minutes on two CPU cores (the stored run shared them with other work). Training
# writes to `runs/notebook`, below the directory that the notebook runs in. Running it again takes the logged data, the
# pre-trained GeMS and the run from there instead of making them anew; delete the directory to start from nothing. With
# the environment variable `GEMSJAX_NOTEBOOK_SMOKE=1` every size is the smallest that works and everything is written to
# a temporary directory: that tests an installation in about a minute, but nothing is learned and the pictures of part
# two mean little.

# %% [markdown]
# ## Before anything else: all cores
#
# On a CPU, XLA runs a simulator mostly on one core. `use_all_cores` makes one JAX device of every core, so that work
# which is split over users, such as logging data and evaluating, uses them all. JAX looks for devices once, when it is
# first used; so this comes first. Where there is a GPU, `jax.devices()` stays the GPU.

# %%
from gemsjax.devices import use_all_cores

use_all_cores()

# %%
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

import gemsjax
from gemsjax import methods, plots, prepare, runs, tracking
from gemsjax.agents.sac import SACHypers
from gemsjax.envs.registry import check_slate
from gemsjax.errors import DataError
from gemsjax.evaluate import evaluate, recommended_scores, user_keys
from gemsjax.maths.slates import best_item
from gemsjax.pretrain.gems import make_pretraining
from gemsjax.rankers.gems import make_gems_ranker
from gemsjax.rollout import rollout
from gemsjax.settings import GeMSSettings, TrainSettings
from gemsjax.train import Plan

SMOKE = os.environ.get("GEMSJAX_NOTEBOOK_SMOKE", "0") == "1"
if SMOKE:
    scratch = tempfile.TemporaryDirectory()  # removed when the kernel ends
    OUT = Path(scratch.name)
else:
    OUT = Path("runs/notebook")

BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, BLACK = plots.COLOURS
plt.rcParams.update(
    {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 96}
)
print(f"JAX {jax.__version__} on {len(jax.devices())} {jax.devices()[0].platform} device(s), smoke test: {SMOKE}")

# %% [markdown]
# # Part one: a user by hand
#
# `gemsjax.make` gives an environment in two halves. `env` is static: sizes and rules. `params` is a pytree of arrays:
# the items, the click model's numbers, how fast users drift. Everything else is a pure function of one user:
#
# * `env.reset(key, params)` draws a user and shows it a first slate, the strongest item of every topic;
# * `env.step(key, state, slate, params)` plays one turn, and
# * `env.click_probabilities(state, slate, params)` says what a turn would do, without playing it.

# %%
env, params = gemsjax.make("focused_topdown")
print(f"{env.num_items} items of {env.num_topics} topics, slates of {env.slate_size}, episodes of {env.horizon} turns")
print("environments:", ", ".join(gemsjax.environments()))

reset, step = jax.jit(env.reset), jax.jit(env.step)
click_probabilities, oracle_slate = jax.jit(env.click_probabilities), jax.jit(env.oracle_slate)

# %% [markdown]
# A user is a vector with two numbers for each topic. The norm of a topic's two numbers is the user's *interest* in the
# topic, and the ten interests sum to one. An agent sees none of this: it observes the slate and which ranks were
# clicked. We look inside.


# %%
def interests(state):
    """How much the user cares for each topic, [T]; they sum to 1."""
    return np.linalg.norm(np.asarray(state.user_embedding).reshape(env.num_topics, env.topic_size), axis=1)


user_key = jax.random.key(2)
observation, state = reset(user_key, params)
print("interests:", interests(state).round(2))
print("the agent sees the slate:", observation.slate, "and its clicks:", observation.clicks.astype(int))

# %% [markdown]
# ## Whom to show what: two rules that know the user
#
# Both rules below are privileged, for they look at the user's true interests. Pictures and tables mark what is
# privileged, that is, sees what only the simulator knows, with ‡.
#
# The **short-term oracle** shows the ten items that suit the user best in this turn. It need not be programmed: in a
# slate, -1 stands for the oracle's item of that rank (and `env.oracle_slate` says which one that is).
#
# The **diverse** rule shows the best item of every topic, best first. A **random** slate is there for comparison.


# %%
def oracle(_key, _observation, _state):
    return jnp.full(env.slate_size, -1)


@jax.jit
def diverse(_key, _observation, state):
    scores = params.item_embeddings @ state.user_embedding
    of_topic = params.item_topics == jnp.arange(env.num_topics)[:, None]
    best = best_item(jnp.where(of_topic, scores, -jnp.inf))
    return best[jnp.argsort(-scores[best])]


def at_random(key, _observation, _state):
    return jax.random.randint(key, (env.slate_size,), 0, env.num_items)


slates = {
    "short-term oracle ‡": oracle_slate(state, params),
    "diverse ‡": diverse(user_key, observation, state),
    "random": at_random(user_key, observation, state),
}
figure, axes = plt.subplots(figsize=(7.5, 3.2))
ranks = np.arange(1, env.slate_size + 1)
for shift, colour, (name, slate) in zip((-0.27, 0, 0.27), (BLUE, ORANGE, GREEN), slates.items(), strict=True):
    chances = click_probabilities(state, slate, params)
    axes.bar(ranks + shift, chances, width=0.25, color=colour, label=f"{name}: {chances.sum():.1f} clicks expected")
    print(f"{name:>19}: topics {params.item_topics[slate]}")
axes.plot(ranks, params.examination[:, 0], color=BLACK, ls=":", marker=".", label="examined at all")
axes.set(xlabel="rank in the slate", ylabel="probability of a click", title="The first turn of one user", xticks=ranks)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# A user examines rank 1 for certain and every further rank with 0.85 times the probability of the one before (dotted).
# An examined item is clicked if it suits the user, and that is nearly a yes or no: the probability rises from 0 to 1
# around a score of 0.28. So for *one* turn the oracle is hard to beat. Now a hundred turns.


# %%
class Diary(NamedTuple):
    """What happened inside one user, [topics, turns]."""

    interest: np.ndarray  # at the start of the turn
    bored: np.ndarray  # topics that the turn masked
    clicks: np.ndarray  # clicked items of the topic


def by_hand(choose, key=user_key, turns=env.horizon):
    """Play one user: `choose(key, observation, state) -> slate`."""
    observation, state = reset(key, params)
    pages = []
    for turn in range(turns):
        before = interests(state)
        choice_key, click_key = jax.random.split(jax.random.fold_in(key, turn))
        slate = choose(choice_key, observation, state)
        observation, state, _, _, _, info = step(click_key, state, slate, params)
        clicked = np.asarray(params.item_topics[observation.slate])[np.asarray(observation.clicks)]
        pages.append((before, np.asarray(info["bored"]), np.bincount(clicked, minlength=env.num_topics)))
    return Diary(*(np.stack(column, axis=1) for column in zip(*pages, strict=True)))


def spells(flags):
    """(start, length) of each run of True in `flags`."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(int)))
    return [(start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True)]


BORED = {"facecolor": (1, 1, 1, 0.35), "edgecolor": "0.15", "lw": 0.5}


def draw_diaries(diaries):
    """Interests as shades, boredom hatched, clicks as dots; below each the clicks of every turn."""
    turns = next(iter(diaries.values())).interest.shape[1]
    favourites = np.argsort(-next(iter(diaries.values())).interest[:, 0])  # the same rows in all panels
    brightest = 1.4 * max(diary.interest.max() for diary in diaries.values())  # dots and hatches show on mid-blue
    figure, panels = plt.subplots(
        2 * len(diaries), 1, figsize=(10, 3.9 * len(diaries)), sharex=True, height_ratios=(4, 1) * len(diaries)
    )
    for top, bottom, (name, diary) in zip(panels[::2], panels[1::2], diaries.items(), strict=True):
        extent = (0.5, turns + 0.5, env.num_topics - 0.5, -0.5)
        shades = top.imshow(
            diary.interest[favourites], aspect="auto", cmap="Blues", vmin=0, vmax=brightest, extent=extent
        )
        for row, topic in enumerate(favourites):
            bars = [(start + 0.65, length - 0.3) for start, length in spells(diary.bored[topic])]
            top.broken_barh(bars, (row - 0.42, 0.84), hatch="//////", **BORED)
            when = np.flatnonzero(diary.clicks[topic])
            sizes = 8 * diary.clicks[topic][when]
            top.scatter(when + 1, np.full(when.size, row), s=sizes, color=ORANGE, edgecolor="black", lw=0.4, zorder=3)
        top.set(ylabel="topic (favourite first)", yticks=range(env.num_topics), yticklabels=favourites)
        total, bored = diary.clicks.sum(), diary.bored.sum(axis=0).mean()
        top.set_title(f"{name}: {total} clicks, bored of {bored:.1f} topics on average", loc="left")
        bottom.bar(np.arange(1, turns + 1), diary.clicks.sum(axis=0), width=0.8, color=ORANGE)
        bottom.set(ylabel="clicks", ylim=(0, env.slate_size), yticks=(0, 5, 10))
    scale = figure.colorbar(shades, ax=list(panels), label="interest in the topic", aspect=60, pad=0.01)
    scale.ax.set_ylim(0, brightest / 1.4)
    panels[-1].set_xlabel("turn")
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=ORANGE, mec="black", mew=0.4, label="clicks (larger: several)"),
        plt.Rectangle((0, 0), 1, 1, hatch="//////", label="bored of the topic", **BORED),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)


diaries = {"Short-term oracle ‡": by_hand(oracle), "Diverse, the best item of every topic ‡": by_hand(diverse)}
draw_diaries(diaries)
plt.show()

# %% [markdown]
# One user, the same luck, two rules. Read a row from left to right:
#
# * **Boredom.** A topic with five clicks among the latest ten bores the user for five turns (hatched), and meanwhile
#   its items are hardly ever clicked. The oracle fills whole slates with what the user likes best right now: a burst of
#   clicks, and the user has had enough of it. Then nothing, for five turns, or for ten if the clicks are still
#   remembered when the first five are over. The diverse rule gets one click from each of several topics, never too much
#   of anything.
# * **Drift.** Every click pulls the user's vector a tenth of the way towards the clicked item. So clicked topics become
#   darker and neglected ones fade: what is shown becomes what is wanted. The oracle's bursts leave this user with a
#   single strong interest, of which it is bored most of the time; no other is strong enough for a click.
#
# The next picture compares the interests before and after.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharex=True, sharey=True)
rows = np.arange(env.num_topics)
for axes, colour, (name, diary) in zip(panels, (BLUE, ORANGE), diaries.items(), strict=True):
    order = np.argsort(-diary.interest[:, 0])
    before, after, clicks = diary.interest[order, 0], diary.interest[order, -1], diary.clicks[order].sum(axis=1)
    axes.hlines(rows, before, after, color=colour, lw=2, alpha=0.5)
    axes.scatter(before, rows, facecolor="white", edgecolor=BLACK, zorder=3, label="turn 1", clip_on=False)
    axes.scatter(after, rows, color=colour, zorder=3, label=f"turn {diary.interest.shape[1]}", clip_on=False)
    for row, count in zip(rows, clicks, strict=True):
        axes.text(1.0, row, f"{count}", transform=axes.get_yaxis_transform(), ha="right", va="center")
    axes.text(1.0, -0.9, "clicks", transform=axes.get_yaxis_transform(), ha="right", va="center")
    axes.set(xlabel="interest in the topic", yticks=rows, yticklabels=order)
    axes.set_title(name, loc="left")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(0.92, 0.0))
strongest = max(diary.interest[:, [0, -1]].max() for diary in diaries.values())
panels[0].set(ylabel="topic (favourite first)", xlim=(0, 1.35 * strongest), ylim=(env.num_topics - 0.4, -0.6))
plt.show()

# %% [markdown]
# ## Numbers that are not items
#
# Inside compiled programs nothing can raise an error, so an item number outside the catalogue is never clicked and sets
# the flag `info["invalid_action"]`. -1 is no error: the observation shows the oracle's item in its place. Slates that
# come from outside are better checked on the host, by `check_slate`.

# %%
slate = jnp.array([-1, 5, 1000, -1, 7, -2, 9, 10, 11, 12])
shown, _, _, _, _, info = step(jax.random.key(3), state, slate, params)
print("asked for:          ", slate)
print("shown:              ", shown.slate)
print("click probabilities:", info["click_probabilities"].round(2))
print("invalid action:     ", info["invalid_action"])
try:
    check_slate(slate, env)
except DataError as error:
    print("check_slate:        ", error)

# %% [markdown]
# ## A thousand users at once
#
# All of this was about one user, and so is every function of the simulator. `jax.vmap` makes many users of one, and
# `jax.lax.scan` makes an episode of a turn. Together they are one compiled program. (`gemsjax.rollout.rollout` does the
# same for agents with memory, and `gemsjax.evaluate.evaluate` plays it for fixed test users.)

# %%
USERS = 100 if SMOKE else 1_000
users = jax.random.split(jax.random.key(4), USERS)


def returns_of(choose):
    """A compiled `(user keys, params) -> clicks of each user over its episode`."""

    def episode(key, params):
        reset_key, turns_key = jax.random.split(key)
        observation, state = env.reset(reset_key, params)

        def turn(carry, key):
            observation, state = carry
            choice_key, click_key = jax.random.split(key)
            slate = choose(choice_key, observation, state)
            observation, state, reward, *_ = env.step(click_key, state, slate, params)
            return (observation, state), reward

        _, rewards = jax.lax.scan(turn, (observation, state), jax.random.split(turns_key, env.horizon))
        return rewards.sum()

    return jax.jit(jax.vmap(episode, in_axes=(0, None)))


play = {"random": returns_of(at_random), "oracle ‡": returns_of(oracle), "diverse ‡": returns_of(diverse)}
returns = {name: np.asarray(program(users, params)) for name, program in play.items()}  # compiles, then plays

started = time.perf_counter()
play["oracle ‡"](users, params).block_until_ready()
seconds = time.perf_counter() - started
print(f"{USERS * env.horizon:,} turns of the oracle in {seconds:.2f} s, compiled before")

# %%
figure, axes = plt.subplots(figsize=(8, 3.4))
edges = np.linspace(0, max(clicks.max() for clicks in returns.values()) + 1, 61)
for colour, (name, clicks) in zip((GREEN, BLUE, ORANGE), returns.items(), strict=True):
    axes.hist(
        clicks, edges, histtype="stepfilled", fc=(colour, 0.5), ec=colour, label=f"{name}: mean {clicks.mean():.0f}"
    )
axes.set(xlabel="clicks of a user in 100 turns", ylabel="users", title=f"{USERS:,} users")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The oracle is three times as good as chance, and yet a rule that knows no more than it does gets four times its clicks
# by not boring people. This gap is what reinforcement learning is for here.
#
# `params` is data, so an environment with other numbers is the *same* compiled program. For example users who do not
# drift, `influence = 0` (the environment `steady_topdown`). All three rules gain. For an item is a mixture of topics,
# and every click on one levels the user's interests a little; lukewarm users click less.

# %%
steady = params.replace(influence=jnp.float32(0.0))
print("mean clicks     users drift    users do not")
for name, program in play.items():
    print(f"{name:<12} {returns[name].mean():14.1f} {program(users, steady).mean():15.1f}")

# %% [markdown]
# # Part two: SAC+GeMS
#
# A real system does not know its users; it must work from slates and clicks. There are about $10^{30}$ slates of ten
# out of a thousand items, too many to choose from directly. **GeMS** makes the choice small. A variational auto-encoder
# is trained on logged slates and their clicks; its decoder turns a vector of 32 numbers, a *latent action*, into a
# slate. **SAC**, soft actor-critic, then learns which latent action to take, given what it remembers of the user's
# clicks.
#
# ## Settings
#
# Settings are frozen dataclasses, checked by `resolved()` before anything compiles:
#
# * `TrainSettings`: which method in which environment, how many steps, and the three below;
# * `Plan`: counts of training, such as how many trajectories the replay buffer holds;
# * `SACHypers`: hyper-parameters of the agent, numbers that can change without compiling again;
# * `GeMSSettings`: pre-training of GeMS and the logged data that it learns from.
#
# These are the quickstart's. The paper trains 100,000 trajectories on a GeMS from 100,000 logged users, and so do these
# classes by default; here it is 4,000 and 4,000. The temperature of SAC starts at 0.01 instead of 1, which finds a good
# policy about ten times sooner.

# %% tags=["settings"]
settings = TrainSettings(
    method="sac-gems",
    env="focused_topdown",
    steps=40 if SMOKE else 4_000,
    epoch_steps=20 if SMOKE else 500,  # between validations
    test_users=50 if SMOKE else 500,
    plan=Plan(warm_up=20 if SMOKE else 100, replay_capacity=4_000, validation_users=20 if SMOKE else 200),
    hypers=SACHypers(initial_alpha=0.01, first_alpha=0.01),
    gems=GeMSSettings(users=100, epochs=1) if SMOKE else GeMSSettings(users=4_000, epochs=4),
).resolved()

# %%
dataclasses.asdict(settings)

# %% [markdown]
# `prepare.world_of` makes the environment that the settings name, with the sizes that networks are built from.

# %%
world = prepare.world_of(settings)
world.env, world.dims

# %% [markdown]
# ## What to compare with
#
# `evaluate` plays one episode with each of the first test users. They and their luck are the same for every method.
# References are methods without anything to learn; the registry `methods` makes them by name. Those marked with ‡
# know the user's true interests. The epsilon-greedy oracle is the *logging policy*: each rank shows the oracle's item
# or, with probability one half, a random one.

# %%
table = {}
for name in ("random", "short-term-oracle", "epsilon-greedy-oracle"):
    method = methods.method(name)
    title = methods.marked(name, method.privileged)
    table[title] = evaluate(world.env, method.policy(world.dims), world.params, users=settings.test_users)
    low, high = table[title].interval
    print(f"{table[title].mean:6.1f} clicks, 95 % interval {low:.1f} to {high:.1f}: {title}")
print(methods.PRIVILEGED)

# %% [markdown]
# ## Logged data
#
# `prepare.logged_data` plays users of the logging policy and stores their slates and clicks in checked chunks, split
# over the cores; where they are on disk already, it reads them.

# %%
data = prepare.logged_data(settings, world, OUT / "logs")
print(f"slates {data.slates.shape} {data.slates.dtype} (users, turns, ranks); clicks {data.clicks.shape}, a bit a rank")

# %% [markdown]
# ## Pre-training GeMS
#
# `prepare.pretrained_gems` trains the auto-encoder on these slates. Its loss asks three things: that the decoder gives
# back the slate, that it gives back the clicks (`click_weight`), and that the code of a slate stays close to a standard
# normal distribution (`beta`), so that codes lie close together and whatever is between them decodes to a slate too.
# The data come as a function, for they are needed only if there is something to train.

# %%
weights = prepare.pretrained_gems(settings, world, OUT, lambda: data)
print("parts of the network:", ", ".join(weights.params))
print("latent dimensions:   ", weights.centre.size)

# %% [markdown]
# ## What a latent action is
#
# The decoder turns a latent action into a query for every rank; there goes the item whose embedding fits the query
# best. Actions live in a box, `centre ± scale`, that spans the codes of logged slates. Here are slates decoded from
# random actions in the box, and from a walk along the dimension in which logged slates differ most. Numbers and colours
# are the topics of the items.

# %%
ranker = make_gems_ranker(make_pretraining(settings.gems.spec, world.dims).vae)
decode = jax.jit(jax.vmap(ranker.decode, in_axes=(None, 0)))

drawn = weights.centre + weights.scale * jax.random.uniform(jax.random.key(6), (9, ranker.action_dim), minval=-1.0)
widest = int(weights.scale.argmax())
walk = jnp.linspace(-1.0, 1.0, 9)
walked = weights.centre + weights.scale * walk[:, None] * jax.nn.one_hot(widest, ranker.action_dim)

TOPIC_COLOURS = np.array([to_rgb(colour) for colour in (*plots.COLOURS[:7], "#882255", "#999999", "#dddddd")])
figure, panels = plt.subplots(1, 2, figsize=(10, 3.8))
for axes, title, actions in zip(panels, ("Random actions", f"Along dimension {widest}"), (drawn, walked), strict=True):
    topics = np.asarray(world.params.item_topics)[np.asarray(decode(weights, actions))]
    axes.imshow(TOPIC_COLOURS[topics], aspect="auto")
    for (row, rank), topic in np.ndenumerate(topics):
        dark = TOPIC_COLOURS[topic] @ (0.3, 0.6, 0.1) < 0.5
        axes.text(rank, row, topic, ha="center", va="center", color="white" if dark else "black")
    axes.set(title=title, xlabel="rank in the slate", xticks=range(10), xticklabels=range(1, 11))
    axes.spines[:].set_visible(False)
panels[0].set(ylabel="action", yticks=range(9), yticklabels=range(1, 10))
panels[1].set(ylabel="position in the box", yticks=range(9), yticklabels=[f"{position:+.2f}" for position in walk])
plt.show()

# %% [markdown]
# Without pre-training an agent would have to choose items one by one. Here every point of the box is a whole slate of
# the kind that was logged, and neighbouring points give similar slates. (GeMS allows an item to appear twice in a
# slate, and so does the simulator.)
#
# ## Training
#
# `runs.train` trains, validates every `epoch_steps` trajectories on users of their own, keeps the best policy so far,
# and plays the test users with it at the end. An epoch is one compiled program, and after each everything is written to
# the run's directory: settings, metrics, a checkpoint. `resume=True` continues what is there. So interrupting the
# kernel stops after the running epoch, and running the cell again goes on. A run with other settings is not continued
# but refused: give it another directory, or `overwrite=True`.

# %%
outcome = runs.train(settings, world, weights, OUT, resume=True)
print("seconds:", {part: round(seconds, 1) for part, seconds in outcome.seconds.items()})

# %%
assert outcome.test is not None, "training was interrupted; run the cell above again to go on"
entry = methods.method(settings.method)
table[entry.title] = outcome.test
for title, evaluation in table.items():
    low, high = evaluation.interval
    print(f"{evaluation.mean:6.1f} clicks, 95 % interval {low:.1f} to {high:.1f}: {title}")
print(methods.PRIVILEGED)

# %% [markdown]
# `plots.learning_curve` draws the metrics of a run, with references as dashed lines.

# %%
references = {title: evaluation for title, evaluation in table.items() if title != entry.title}
rows = tracking.read_metrics(outcome.directory)
figure = plots.learning_curve(rows, f"{entry.title} in {settings.env}", references)
plt.show()

# %% [markdown]
# ## The trained policy
#
# `runs.load` makes a policy of a run directory: `trained.agent.greedy` chooses, and acts on `trained.acting`, the best
# validated state. `recommended_scores` plays users with a policy and notes how well its items suited them;
# `plots.score_densities` draws that as the paper's Figure 2 does. An item to the right of the dotted line is probably
# clicked once it is examined; the triangle is the mean.

# %%
trained = runs.load(outcome.directory)
myopic = methods.method("short-term-oracle")
myopic_title = methods.marked("short-term-oracle", myopic.privileged)
few = min(200, settings.test_users)
recommended = {
    myopic_title: recommended_scores(world.env, myopic.policy(world.dims), world.params, users=few),
    entry.title: recommended_scores(world.env, trained.agent.greedy, world.params, trained.acting, users=few),
}
figure = plots.score_densities(recommended, float(world.params.relevance_offset))
plt.show()

# %% [markdown]
# And the user of part one, played by hand again, by a policy that sees clicks only. A policy is two pure functions:
# `start()` gives its memory, and `act` takes the memory and an observation and gives a choice and the new memory.

# %%
greedy = trained.agent.greedy
act = jax.jit(greedy.act)


def learned():
    """A rule for `by_hand` that remembers what it has seen of one user."""
    memory = greedy.start()

    def choose(_key, observation, _state):
        nonlocal memory
        # Neither hidden information nor random numbers: greedy policies need no luck.
        choice, memory = act(trained.acting, memory, observation, None, jnp.zeros(greedy.draws))
        return choice.slate

    return choose


diary = by_hand(learned())
draw_diaries({entry.title: diary})
plt.show()

# %% [markdown]
# In the run that is stored here the policy does not look for this user's favourites at all. It shows much the same
# slate again and again; after some twenty turns of few clicks the user has drifted to it, and from then on it is
# clicked from several topics at once, without boredom.
#
# ## How personal is it?
#
# So let us count the slates that it shows to test users, and compare it with the plainest rule there is: its most
# frequent slate, to everyone, always. And let us play both for users who do not drift. (SAC+GeMS meets the test users,
# the rules those of part one.)


# %%
@jax.jit
def slates_shown(keys):
    policy, params, acting = trained.agent.greedy, world.params, trained.acting
    slates, _last_observation = rollout(world.env, policy, keys, params, acting, lambda turn: turn.shown.slate)
    return slates.reshape(-1, world.env.slate_size)


distinct, counts = np.unique(slates_shown(user_keys("test", few)), axis=0, return_counts=True)
shares = np.sort(counts)[::-1] / counts.sum()
print(f"{len(distinct)} different slates; the two most frequent are {shares[:2].sum():.0%} of all that were shown")

constant = jnp.asarray(distinct[counts.argmax()])
play["constant"] = returns_of(lambda _key, _observation, _state: constant)
print("\nmean clicks     users drift    users do not")
for name, program in play.items():
    print(f"{name:<12} {program(users, params).mean():14.1f} {program(users, steady).mean():15.1f}")
unmoved = evaluate(world.env, greedy, steady, trained.acting, users=settings.test_users)
print(f"{entry.title:<12} {outcome.test.mean:14.1f} {unmoved.mean:15.1f}")

# %% [markdown]
# Most of what was learned is a slate that users come to like. That is worth knowing before methods are compared on
# these environments: with drift, a slate that is shown often enough creates the taste that it serves. Where
# recommendations have to fit the user, as in the environments `steady_*`, the same policy falls below the short-term
# oracle. It was not trained there, to be fair: for that, set `env="steady_topdown"` in the settings above.
#
# ## Where to go from here
#
# * `python -m experiments.train --help` trains at any size, with the paper's settings as defaults.
# * `python -m experiments.evaluate --help` tests a run's directory or any method by name.
# * `gemsjax.register("calm", "focused_topdown", influence=0.02)` gives a name to an environment of your own, which all
#   of this then accepts.
