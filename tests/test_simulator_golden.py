"""The simulator against recorded episodes of the original implementation, turn by turn.

Each file holds 12 episodes of 100 turns. Every turn starts from the recorded state, so an error shows where it happens
instead of growing over the episode.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemsjax
from gemsjax.envs.topics import TopicState

GOLDEN = Path(__file__).parent / "golden"
NAMES = {
    "bored": "state_bored",
    "bored_timeout": "state_bored_timeout",
    "clicked_topics": "state_clicked_items",
    "clicked_topics_length": "state_clicked_items_len",
    "click_times": "state_clicked_step",
    "click_times_length": "state_clicked_step_len",
    "time": "state_t",
}


@pytest.fixture(scope="module", params=["topdown", "mix", "divpen"])
def recorded(request):
    """The recording, and the environment of the same settings with its items."""
    with np.load(GOLDEN / f"simulator_{request.param}.npz") as archive:
        record = {name: archive[name] for name in archive.files}
    env, params = gemsjax.make(f"focused_{request.param}", catalogue=record["item_embedd"])
    return env, params, record


def states(record, turns):
    """The recorded states [episode, turn] of the given turns, 0 being the reset."""
    fields = {field: jnp.asarray(record[name][:, turns], jnp.int32) for field, name in NAMES.items()}
    fields["bored"] = fields["bored"].astype(bool)
    user = jnp.asarray(record["state_user_embedd"][:, turns])
    # The recording indexes topics by rank here (no effect at boost 1); the simulator keeps the item's topic.
    return TopicState(user_embedding=user, short_term_topic=jnp.zeros_like(fields["time"]), **fields)


def over_turns(function):
    return jax.jit(jax.vmap(jax.vmap(function)))


def test_catalogue_and_examination_follow_from_the_items(recorded):
    _, params, record = recorded
    np.testing.assert_array_equal(params.item_topics, record["item_comp"])
    np.testing.assert_array_equal(params.first_slate, record["reset_slate"][0])
    np.testing.assert_allclose(params.examination, record["propensities"], rtol=1e-6)
    np.testing.assert_allclose(params.max_score, record["max_score"], rtol=1e-6)
    assert params.diversity_penalty == record["diversity_penalty"]
    assert params.diversity_threshold == record["diversity_threshold"]


def test_states_follow_from_recorded_clicks(recorded):
    env, params, record = recorded
    slate, clicks = jnp.asarray(record["slate"], jnp.int32), jnp.asarray(record["clicks"])
    after = over_turns(lambda state, slate, clicks: env.transition(state, slate, clicks, params))(
        states(record, slice(0, 100)), slate, clicks
    )
    for field, name in NAMES.items():
        np.testing.assert_array_equal(getattr(after, field), record[name][:, 1:], err_msg=field)
    np.testing.assert_allclose(after.user_embedding, record["state_user_embedd"][:, 1:], atol=1e-6)


def test_click_probabilities(recorded):
    env, params, record = recorded
    slate = jnp.asarray(record["slate"], jnp.int32)
    probability = over_turns(lambda state, slate: env.click_probabilities(state, slate, params))(
        states(record, slice(0, 100)), slate
    )
    np.testing.assert_allclose(probability, record["click_prob"], atol=1e-5)


def test_a_turn_reports_scores_boredom_and_the_oracle_slate(recorded):
    env, params, record = recorded

    def turn(state, asked, uniforms):
        return env.play(uniforms, state, env.resolve(state, asked, params), params)

    # A uniform number of 0 is a click wherever one is possible, 1 never is: the recorded clicks come back.
    uniforms = jnp.where(record["clicks"] == 1, 0.0, 1.0)
    asked = jnp.asarray(record["slate_in"], jnp.int32)
    shown, _, reward, _, truncated, info = over_turns(turn)(states(record, slice(0, 100)), asked, uniforms)
    np.testing.assert_array_equal(shown.slate, record["slate"])
    np.testing.assert_array_equal(shown.clicks, record["clicks"])
    np.testing.assert_array_equal(reward, record["reward"])
    np.testing.assert_allclose(info["scores"], record["norm_scores"], atol=1e-6)
    np.testing.assert_allclose(info["click_probabilities"], record["click_prob"], atol=1e-5)
    np.testing.assert_array_equal(info["bored"], record["state_bored"][:, 1:])
    assert not info["invalid_action"].any()
    assert truncated[:, -1].all() and not truncated[:, :-1].any()


def test_reset(recorded):
    env, params, record = recorded
    user, clicks = jnp.asarray(record["state_user_embedd"][:, 0]), jnp.asarray(record["reset_clicks"])
    start = jax.jit(jax.vmap(lambda user, clicks: env.initial_state(user, clicks, params)))(user, clicks)
    for field, name in NAMES.items():
        np.testing.assert_array_equal(getattr(start, field), record[name][:, 0], err_msg=field)
    np.testing.assert_array_equal(start.user_embedding, user)
    first = jnp.broadcast_to(params.first_slate, (len(user), env.slate_size))
    probability = jax.jit(jax.vmap(lambda state, slate: env.click_probabilities(state, slate, params)))(
        start.replace(clicked_topics=jnp.full_like(start.clicked_topics, -1)), first
    )
    np.testing.assert_allclose(probability, record["reset_click_prob"], atol=1e-5)
