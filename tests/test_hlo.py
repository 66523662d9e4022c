"""What the benchmarks read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import hlo

AXES = dict(a=2, b=4)
SIZE = 4 * 16 * 16  # Bytes of what a device has, float32[16, 16].


def per_device(fn, *axes):
    """The collectives of a function that each of eight devices runs on its array."""
    mesh = jax.make_mesh((*AXES.values(),), (*AXES,), axis_types=(AxisType.Auto,) * 2)
    run = jax.shard_map(
        fn, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False
    )
    x = jax.ShapeDtypeStruct((8 * 16, 16), "float32")
    return hlo.collectives(jax.jit(run).lower(x).compile().as_text() or "")


def shift(x, axis):
    n = AXES[axis]
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


def scatter(x, axis):
    return jax.lax.psum_scatter(x, axis, tiled=True)


def exchange(x, axis):
    return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)


# Each with the bytes of what is exchanged and of what is sent, in a group of n.
COLLECTIVES = {
    "all-reduce": (jax.lax.psum, lambda n: SIZE, lambda n: 2 * SIZE * (n - 1) / n),
    "all-gather": (jax.lax.all_gather, lambda n: SIZE * n, lambda n: SIZE * (n - 1)),
    "reduce-scatter": (scatter, lambda n: SIZE, lambda n: SIZE * (n - 1) / n),
    "all-to-all": (exchange, lambda n: SIZE, lambda n: SIZE * (n - 1) / n),
    "collective-permute": (shift, lambda n: SIZE, lambda n: SIZE),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_collective_is_found_with_its_bytes_and_axis(kind, axis):
    run, size, sent = COLLECTIVES[kind]
    (found,) = per_device(lambda x: run(x, axis))
    n = AXES[axis]
    assert (found.kind, found.times) == (kind, 1)
    assert (found.bytes, found.sent) == (size(n), sent(n))
    assert found.axes(AXES) == (axis,)


def test_a_collective_over_all_devices_is_over_both_axes():
    (found,) = per_device(lambda x: jax.lax.psum(x, ("a", "b")))
    assert found.axes(AXES) == ("a", "b")
    assert found.groups.shape == (1, 8)


def test_what_is_exchanged_within_one_device_is_nothing():
    assert per_device(lambda x: jax.lax.psum(x, ())) == []


def test_a_collective_in_a_loop_runs_in_each_of_its_rounds():
    def loop(length, body):
        def step(x, _):
            return jnp.tanh(body(x)), None

        return lambda x: jax.lax.scan(step, x, None, length=length)[0]

    def total(x):
        return jax.lax.psum(x, "a")

    def both(x):
        return loop(5, total)(jax.lax.psum(x, "b"))

    found = {c.axes(AXES): c.times for c in per_device(loop(7, both))}
    assert found == {("b",): 7, ("a",): 7 * 5}


def test_of_branches_each_counts():
    def one_of(x):
        branches = [lambda x: jax.lax.psum(x, "a"), lambda x: jax.lax.psum(x, "b")]
        return jax.lax.cond(x[0, 0] > 0, *branches, x)

    found = {c.axes(AXES): c.times for c in per_device(one_of)}
    assert found == {("a",): 1, ("b",): 1}


def test_a_loop_of_unknown_length_counts_once():
    def until_large(x):
        return jax.lax.while_loop(
            lambda x: x[0, 0] < 1, lambda x: 2 * jax.lax.psum(x, "a"), x
        )

    assert [c.times for c in per_device(until_large)] == [1]


#
# What XLA writes for TPUs, where libtpu is not there to write it.
#
MODULE = """HloModule m

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  {}
}}
"""
GROUPS = [
    "{{0,4},{1,5},{2,6},{3,7}}",
    "[4,2]<=[2,4]T(1,0)",
    "mesh['a'=2,'b'=4] {'a'}",
    "mesh['x'=8] {'x':(1)2}",
    "mesh['a'=2,'x'=2,'y'=2] {'a'}",
    "mesh['b'=4,'one'=1,'a'=2], device_ids=([2,4]T(1,0)) {'a'}",
    "mesh['b'=4,'a'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}",
]


def only(operation):
    (found,) = hlo.collectives(MODULE.format(operation))
    return found


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_are_the_same_in_each_notation(groups):
    found = only(f"ROOT %r = f32[8]{{0}} all-reduce(%p), replica_groups={groups}, x=y")
    assert np.array_equal(found.groups, [[0, 4], [1, 5], [2, 6], [3, 7]])


@pytest.mark.parametrize(
    "grouped, groups",
    [
        ("'a','b'", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("'b':(1)2", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("'b':(2)2", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("'a','b':(2)2", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ],
)
def test_groups_are_over_parts_of_mesh_axes(grouped, groups):
    mesh = f"mesh['a'=2,'b'=4] {{{grouped}}}"
    found = only(f"ROOT %r = f32[8] all-reduce(%p), replica_groups={mesh}")
    assert np.array_equal(found.groups, groups)


def test_unknown_groups_are_an_error():
    with pytest.raises(ValueError, match="No groups of devices"):
        only("ROOT %r = f32[8] all-reduce(%p), replica_groups=new notation")


@pytest.mark.parametrize(
    "operation, size",
    [
        ("(f32[8]{0:T(256)S(1)}, bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce", 44),
        ("(f32[8]{0}, f32[16]{0}) all-gather-start", 64),
        ("((f32[8], s8[2]), (f32[16], s8[4])) all-gather-start", 68),
        ("(f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]) collective-permute-start", 32),
        ("(pred[], pred[], u32[], u32[]) collective-permute-start", 1),
        ("((f32[8]), f32[4], u32[]) reduce-scatter-start", 32),
        ("f8e4m3fn[8] all-reduce-start", 8),
        ("s4[8] all-to-all", 4),
    ],
)
def test_bytes_are_those_of_what_is_exchanged(operation, size):
    pairs = "source_target_pairs" if "permute" in operation else "replica_groups"
    found = only(
        f"ROOT %r = {operation}(%p), channel_id=1, {pairs}={{{{0,1}},{{1,0}}}}"
    )
    assert found.bytes == size


def test_a_collective_that_overlaps_several_fusions_is_one():
    gather = "f32[16] all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8]"
    fusions = "".join(
        f"%f{i} (p: f32[8]) -> f32[16] {{\n  ROOT %g{i} = {gather}\n}}\n"
        for i in range(3)
    )
    calls = "\n  ".join(
        f"%c{i} = f32[16] fusion(%p), kind=kLoop, calls=%f{i}" for i in range(3)
    )
    assert [c.times for c in hlo.collectives(fusions + MODULE.format(calls))] == [1]


@pytest.mark.parametrize("start, limit", [(0, 6), (2, 6), (5, 6)])
def test_trips_are_read_from_the_condition_of_a_loop(start, limit):
    text = f"""
%body (t: (f32[8], s32[])) -> (f32[8], s32[]) {{
  %t = (f32[8], s32[]) parameter(0)
  %x = f32[8] get-tuple-element(%t), index=0
  %r = f32[8] all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8]
  ROOT %n = (f32[8], s32[]) tuple(%r, %i)
}}

%condition (t: (f32[8], s32[])) -> pred[] {{
  %t = (f32[8], s32[]) parameter(0)
  %limit = s32[]{{:T(128)}} constant({limit})
  %i = s32[]{{:T(128)}} get-tuple-element(%t), index=1
  ROOT %l = pred[]{{:T(512)}} compare(%i, %limit), direction=LT
}}
""" + MODULE.format(f"""%first = s32[] constant({start})
  %made = (f32[8], s32[]) tuple(%p, /*index=1*/%first)
  ROOT %w = (f32[8], s32[]) while(%made), condition=%condition, body=%body""")
    assert [c.times for c in hlo.collectives(text)] == [limit - start]


def test_what_a_loop_asks_counts_too():
    def run(x):
        def goes_on(x):
            return jax.lax.psum(jnp.sum(x), "a") < 100

        return jax.lax.while_loop(goes_on, lambda x: x + 1, x)

    assert [c.kind for c in per_device(run)] == ["all-reduce"]


def test_a_collective_of_no_known_kind_is_an_error():
    line = "%r = f32[8] ragged-all-to-all(%p), replica_groups={{0,4},{1,5}}"
    with pytest.raises(ValueError, match=r"no known kind: .*ragged-all-to-all"):
        hlo.collectives(MODULE.format(line))
