"""Values as arrays of numpy, in which they can be kept and sent, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def to_numpy(x: Any) -> np.ndarray:
    """An array as it is sent: keys as their data; float0, which is nothing, as bool."""
    if getattr(x, "dtype", None) == jax.dtypes.float0:
        return np.zeros(x.shape, bool)
    is_array = isinstance(x, jax.Array)
    is_key = is_array and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def from_numpy(x: Any, aval: Any) -> Any:
    """The value of a type that is sent so; arrays of numbers stay as they are."""
    if aval.dtype == jax.dtypes.float0:
        return np.zeros(aval.shape, aval.dtype)
    if not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return x
    # Of a type JAX tells no implementation, in 0.10.
    impl = jax.random.key_impl(jnp.zeros((), aval.dtype))
    return jax.random.wrap_key_data(x, impl=impl)


def as_sent(aval: Any) -> Any:
    """The type of a value as it is sent, see `to_numpy`."""
    if aval.dtype == jax.dtypes.float0:
        return jax.ShapeDtypeStruct(aval.shape, bool)
    if not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return aval
    struct = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return jax.eval_shape(jax.random.key_data, struct)
