"""Eight CPU devices, for the tests of sharding; the others use the first."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
