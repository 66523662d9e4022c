"""A decoder-only transformer: its configurations, its loss, and what it writes.

The blocks are modules of Flax NNX; what trains them are pure functions over a tree of
arrays, as `jax.grad`, `optax` and drjax take it. The blocks' parameters are stacked,
`[layers, ...]`, and applied by a scan, so that compile time does not grow with depth.
On a mesh with an axis `model`, `specs` splits attention by heads, the hidden units, and
the vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a transformer.

    Args:
      vocab: how many tokens there are; a multiple of the devices that share a model.
      layers: how many blocks.
      width: of what flows between blocks.
      heads: of attention, each `width / heads` wide.
      length: how many tokens it looks back at most, and the length of an example.
      dtype: of activations and matmuls; parameters are float32.
      remat: whether gradients compute a block's activations again rather than keep
        them.
    """

    vocab: int
    layers: int
    width: int
    heads: int
    length: int
    dtype: str = "bfloat16"
    remat: bool = True

    @property
    def hidden(self) -> int:
        return 4 * self.width


# By their number of parameters; `tiny` has 0.3 million, for a CPU.
CONFIGS = {
    "tiny": Config(80, 3, 96, 4, 64, dtype="float32", remat=False),
    "1b": Config(32_768, 20, 2048, 16, 2048),
    "8b": Config(32_768, 40, 4096, 32, 2048),
}


class Block(nnx.Module):
    """Attention, then an MLP, each added to what comes in."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, heads = config.width, config.heads
        dtype = jnp.dtype(config.dtype)
        head = width // heads
        linear = functools.partial(
            nnx.LinearGeneral, use_bias=False, dtype=dtype, rngs=rngs
        )
        norm = functools.partial(nnx.RMSNorm, width, dtype=dtype, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.qkv = linear(width, (3, heads, head))
        self.out = linear((heads, head), width, axis=(-2, -1))
        self.up = linear(width, config.hidden)
        self.down = linear(config.hidden, width)

    def __call__(self, x: Any) -> Any:
        """Of activations `[batch, length, width]`."""
        q, k, v = jnp.moveaxis(self.qkv(self.attention_norm(x)), -3, 0)
        mixed = jax.nn.dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        x = x + self.out(mixed)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


def _rotate(x: Any) -> Any:
    """Turns the pairs of `[batch, length, heads, head]` by angles of their position."""
    length, half = x.shape[1], x.shape[-1] // 2
    angles = jnp.arange(length)[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@functools.cache
def _graph(config: Config) -> Any:
    """What a block is without its parameters."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))[0]


def init(config: Config, key: Any) -> Any:
    """Parameters drawn by a key: a tree of float32 arrays."""
    for_tokens, for_blocks = jax.random.split(key)

    def block(key: Any) -> Any:
        return nnx.to_pure_dict(nnx.state(Block(config, nnx.Rngs(key)), nnx.Param))

    tokens = jax.random.normal(for_tokens, (config.vocab, config.width))
    return {
        "tokens": tokens * 0.02,
        "blocks": jax.vmap(block)(jax.random.split(for_blocks, config.layers)),
        "norm": jnp.ones(config.width),
    }


# By the name of a parameter.
_SPECS = {
    "tokens": P("model"),
    "qkv": P(None, None, None, "model"),  # [layers, width, 3, heads, head]
    "out": P(None, "model"),  # [layers, heads, head, width]
    "up": P(None, None, "model"),  # [layers, width, hidden]
    "down": P(None, "model"),  # [layers, hidden, width]
}


def spec_of(path: Any) -> P:
    """How a mesh axis `model` splits a leaf, in any tree that has parameters in it.

    Such as that of an optimizer, of whose state some parts look like the parameters.
    """
    names = [getattr(key, "key", None) for key in path]
    return next((_SPECS[name] for name in names if name in _SPECS), P())


def specs(config: Config) -> Any:
    """How a mesh axis `model` splits the parameters: a tree of PartitionSpecs."""
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda path, _: spec_of(path), shapes)


def logits(config: Config, params: Any, tokens: Any) -> jax.Array:
    """Of what comes after each token: `[batch, length] -> [batch, length, vocab]`."""
    dtype = jnp.dtype(config.dtype)

    def layer(x: Any, block: Any) -> Any:
        return nnx.merge(_graph(config), block)(x), None

    table = params["tokens"].astype(dtype)
    # The table is small, for it is the last matmul too.
    x = table[tokens] * jnp.asarray(config.width**0.5, dtype)
    body = jax.checkpoint(layer, prevent_cse=False) if config.remat else layer
    x, _ = jax.lax.scan(body, x, params["blocks"])
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    x = (x * params["norm"]).astype(dtype)
    return jnp.einsum("blw,vw->blv", x, table, preferred_element_type=jnp.float32)


def loss(config: Config, params: Any, tokens: Any) -> jax.Array:
    """Mean nats of the tokens of examples `[batch, length + 1]`, but the first ones."""
    found = logits(config, params, tokens[:, :-1])
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, 1:])
    )


def sample(
    config: Config, params: Any, prompt: Any, count: int, key: Any, temperature: Any
) -> jax.Array:
    """The prompt `[n]`, and `count` tokens that may follow it: `[n + count]`."""
    n, total = len(prompt), len(prompt) + count
    text = jnp.zeros(max(total, config.length), jnp.int32).at[:n].set(prompt)

    def write(text: Any, i: Any) -> Any:
        start = jnp.maximum(i - config.length, 0)
        window = jax.lax.dynamic_slice(text, (start,), (config.length,))
        found = logits(config, params, window[None])[0, i - 1 - start]
        token = jax.random.categorical(jax.random.fold_in(key, i), found / temperature)
        return text.at[i].set(token), None

    return jax.lax.scan(write, text, jnp.arange(n, total))[0][:total]
