"""Personalisation of any ranker by REINFORCE, one small state per user: the rule, and a store of a million users.

    store = make_store(users=1_000_000, dim=32)
    table = store.init()
    table, updated, known = store.update(table, ids, interactions, PersonalisationConfig())
    save(store, table, "users/")

`policy` has the pure functions of one user, `store` the array of all, `files` that array on the disk.
"""

from gemsjax.personalisation.files import load, save
from gemsjax.personalisation.policy import (
    Interaction,
    PersonalisationConfig,
    UserState,
    check_config,
    learn,
    new_user,
    policy_scores,
    replay,
    update,
)
from gemsjax.personalisation.store import Learnt, Store, check_user_ids, make_store

__all__ = [
    "Interaction",
    "Learnt",
    "PersonalisationConfig",
    "Store",
    "UserState",
    "check_config",
    "check_user_ids",
    "learn",
    "load",
    "make_store",
    "new_user",
    "policy_scores",
    "replay",
    "save",
    "update",
]
