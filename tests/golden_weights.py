"""Recorded weights of the published implementation as parameter trees of ours (its linear weights are [out, in])."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


def load(name: str) -> Arrays:
    with np.load(Path(__file__).parent / "golden" / name, allow_pickle=False) as file:
        return dict(file)


def linear(g: Arrays, prefix: str) -> dict:
    return {"kernel": jnp.asarray(g[f"{prefix}.weight"].T), "bias": jnp.asarray(g[f"{prefix}.bias"])}


def mlp(g: Arrays, prefix: str, layers: tuple[int, ...] = (0, 2)) -> dict:
    return {f"layer{i}": linear(g, f"{prefix}.{number}") for i, number in enumerate(layers)}


def critic(g: Arrays, prefix: str) -> dict:
    return {**linear(g, f"{prefix}.0"), "out": linear(g, f"{prefix}.2")}


def gru(g: Arrays, prefix: str, who: str) -> dict:
    cell = f"{prefix}gru.{who}"
    return {
        "item_embeddings": jnp.asarray(g[f"{prefix}item_embeddings.{who}.embedd.weight"]),
        "input_kernel": jnp.asarray(g[f"{cell}.weight_ih_l0"].T),
        "input_bias": jnp.asarray(g[f"{cell}.bias_ih_l0"]),
        "recurrent_kernel": jnp.asarray(g[f"{cell}.weight_hh_l0"].T),
        "recurrent_bias": jnp.asarray(g[f"{cell}.bias_hh_l0"]),
    }


def vae(g: Arrays, prefix: str) -> dict:
    return {
        "item_embeddings": jnp.asarray(g[f"{prefix}item_embeddings.weight"]),
        "encoder": mlp(g, f"{prefix}inference", (0, 2, 4)),
        "decoder": mlp(g, f"{prefix}decoder", (0, 2)),
        "slate_head": linear(g, f"{prefix}slate_decoder"),
        "click_head": linear(g, f"{prefix}click_decoder"),
    }
