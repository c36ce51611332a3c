"""Programs are read as they run: loops, products, convolutions and collectives against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dreamllm_jax.planning import hlo
from dreamllm_jax.planning.program import axes_of, between_slices, communicating, read_program, valid_taps

MESH = {"data": 2, "tensor": 4}


def program(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_program(jax.jit(function).lower(*arguments).compile().as_text(), {"data": 1})


def test_products_count_as_often_as_their_loops_run():
    def function(x, w):
        def outer(x, _):
            x = jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), x)
            return x @ w, None

        return jax.lax.scan(outer, x, length=5)[0]

    read = program(function, (8, 32), (32, 32))
    assert read.mxu_flops == 2 * 8 * 32 * 32 * 5 * (7 + 1)
    assert read.unknown_loops == () and read.collectives == () and read.kernel_flops == 0


def test_products_of_many_shapes():
    read = program(lambda x, y: jnp.einsum("bik,bjk->bij", x, y), (3, 5, 7), (3, 11, 7))
    assert read.mxu_flops == 2 * 3 * 5 * 11 * 7
    branches = program(lambda i, x: jax.lax.cond(i[0] > 0, lambda x: jnp.tanh(x @ x), lambda x: x, x), (1,), (16, 16))
    assert branches.mxu_flops == 2 * 16**3


def test_a_loop_of_unknown_length_is_told():
    def function(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: x @ x, x)

    read = program(function, (16, 16))
    assert read.mxu_flops == 2 * 16**3 and len(read.unknown_loops) == 1


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_do_not_count_taps_on_padding(stride):
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    side, taps = 16, (3 * 16 - 2) if stride == 1 else (3 * 8 - 1)
    forward = program(convolve, (2, side, side, 16), (3, 3, 16, 32))
    assert forward.mxu_flops == 2 * 2 * taps**2 * 16 * 32
    both = program(jax.grad(lambda x, w: jnp.sum(convolve(x, w) ** 2), (0, 1)), (2, side, side, 16), (3, 3, 16, 32))
    assert both.mxu_flops == 3 * forward.mxu_flops


def test_valid_taps():
    assert valid_taps(8, 3, 8, stride=1, padding=1) == 3 * 8 - 2
    assert valid_taps(8, 3, 4, stride=2, padding=0) == 3 * 4 - 1
    assert valid_taps(4, 3, 8, stride=1, padding=1, left_dilation=2) == 12 - 1
    assert valid_taps(8, 3, 8, stride=1, padding=2, right_dilation=2) == 3 * 8 - 4


def mesh():
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def sharded(function, *specs):
    """`function` of 8 x 64 x 64 float32 arrays on 2 x 4 devices, the last of `specs` the result's."""
    *inputs, result = (NamedSharding(mesh(), spec) for spec in specs)
    shapes = [jax.ShapeDtypeStruct((8, 64, 64), jnp.float32, sharding=sharding) for sharding in inputs]
    return read_program(jax.jit(function, out_shardings=result).lower(*shapes).compile().as_text(), MESH)


SIZE = 8 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("function", "specs", "kind", "axis", "wire"),
    [
        (lambda x: x + 1, (P("tensor"), P()), "all-gather", "tensor", SIZE * 3 / 4),
        (lambda x: x + 1, (P("data"), P()), "all-gather", "data", SIZE / 2),
        (lambda x: x + 1, (P(("data", "tensor")), P()), "all-gather", "data+tensor", SIZE * 7 / 8),
        (lambda x: x.sum(0), (P("tensor"), P()), "all-reduce", "tensor", 2 * 64 * 64 * 4 * 3 / 4),
        (lambda x: x.sum(0), (P("data"), P()), "all-reduce", "data", 2 * 64 * 64 * 4 / 2),
        (lambda x: x + 1, (P("tensor"), P(None, "tensor")), "all-to-all", "tensor", SIZE / 4 * 3 / 4),
        (lambda x: jnp.roll(x, 1, 0), (P(("data", "tensor")), P(("data", "tensor"))), "collective-permute", None, None),
    ],
    ids=["gather", "gather data", "gather both", "reduce", "reduce data", "exchange", "permute"],
)
def test_collectives_are_told_by_kind_and_axis(function, specs, kind, axis, wire):
    found = [one for one in sharded(function, *specs).collectives if one.kind == kind]
    assert found
    if axis:
        assert [(one.axis, one.bytes) for one in found] == [(axis, wire)]


def test_collectives_in_loops_count_every_time():
    def function(x, w):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P(None, "tensor")), None

        return jax.lax.scan(layer, x[0], w)[0]

    with jax.set_mesh(mesh()):
        read = sharded(function, P(), P(), P())
    assert [(one.kind, one.axis, one.count) for one in read.collectives] == [("all-gather", "tensor", 8 + 1)]


@pytest.mark.parametrize(
    ("attributes", "groups", "axis"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [(0, 1, 2, 3), (4, 5, 6, 7)], "tensor"),
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)], "tensor"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)], "data"),
        ("replica_groups=[1,8]<=[8]", [tuple(range(8))], "data+tensor"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [(0, 4), (1, 5), (2, 6), (3, 7)], "data"),
        (
            "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}",
            [(0, 1, 2, 3), (4, 5, 6, 7)],
            "tensor",
        ),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,4,1,5) {'b'}", [(0, 4), (1, 5)], "data"),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [(0, 1, 2, 3), (4, 5, 6, 7)], "tensor"),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [(0, 4), (1, 5), (2, 6), (3, 7)], "data"),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,4}}", [(0, 1), (1, 2), (2, 3), (3, 0)], "tensor"),
        ("source_target_pairs={{0,4},{4,0}}", [(0, 4), (4, 0)], "data"),
        ("replica_groups=[8,1]<=[8]", [], ""),
        ("replica_groups={}", None, "data+tensor"),
        ("replica_groups={{0,8}}", [(0, 8)], "other"),
    ],
)
def test_groups_in_every_notation(attributes, groups, axis):
    assert communicating(f", channel_id=1, {attributes}, dimensions={{0}}", MESH) == groups
    assert axes_of(groups, MESH) == axis


@pytest.mark.parametrize(
    ("transfer", "slices", "kind", "factor"),
    [
        ("ALL_REDUCE", "1,2", "all-reduce", 1.0),
        ("ALL_REDUCE", "1:4", "all-reduce", 1.5),
        ("ALL_GATHER", "1,2,3", "all-gather", 2.0),
        ("REDUCE_SCATTER", "1:4", "reduce-scatter", 0.75),
    ],
)
def test_transfers_between_slices(transfer, slices, kind, factor):
    attributes = f'_xla_megascale_target="{{{slices}}}x{{0:3}}",_xla_megascale_transfer_type="{transfer}"'
    assert between_slices(attributes) == (kind, factor)


def test_groups_in_an_unknown_notation_are_refused():
    with pytest.raises(ValueError, match="written in an unknown way: replica_groups=<8>"):
        communicating("replica_groups=<8>", MESH)


TPU_TEXT = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %attend = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"5"}}}
  %moved = bf16[8,128]{1,0:T(8,128)(2,1)} copy(%attend), backend_config={"estimated_cycles":"50"}
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%next, %moved)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  ROOT %lt = pred[]{:T(512)} compare(%a, %b), direction=LT
}

%condition (q: (s32[], bf16[8,128])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %end = s32[]{:T(128)} constant(13)
  ROOT %compared = pred[]{:T(512)} fusion(%j, %end), kind=kLoop, calls=%less
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %start = s32[]{:T(128)} constant(3)
  %begin = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%start, %x.1)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%begin), condition=%condition, body=%body
  ROOT %result = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_a_program_for_tpu():
    """A loop that counts 3, 5, ... 11 under a fused condition; a Pallas kernel; the compiler's cycles."""
    module = hlo.parse(TPU_TEXT)
    assert hlo.trip_count(module, "main", module.computations["main"]["loop"]) == 5
    read = read_program(TPU_TEXT, {"data": 1})
    assert (read.kernel_flops, read.cycles, read.mxu_flops) == (5 * 1000, 5 * 50, 0)
    array = 8 * 128 * 2
    assert read.hbm_bytes == 5 * (4 * array + 3 * 4)  # kernel and copy read one and write one each; and the counter


SPARSE_CORE_TEXT = """HloModule jit_step, is_scheduled=true

%gather (p: bf16[16,128]) -> bf16[64,128] {
  %p = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, \
replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[16,128]) -> bf16[64,128] {
  %x = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %begun = ((), (), s32[]{:S(2)}) call-start(), async_execution_thread="sparsecore", to_apply=%gather
  %given = ((bf16[16,128]{1,0:T(8,128)(2,1)}), bf16[64,128]{1,0:T(8,128)(2,1)}) call-update(%begun, %x)
  ROOT %result = bf16[64,128]{1,0:T(8,128)(2,1)} call-done(%given)
}
"""


def test_a_gather_on_sparse_cores():
    read = read_program(SPARSE_CORE_TEXT, MESH)
    (gather,) = read.collectives
    assert (gather.kind, gather.axis, gather.count) == ("all-gather", "tensor", 1)
    array = 64 * 128 * 2
    assert gather.bytes == array * 3 / 4 and read.hbm_bytes == array * (1 + 1 / 4)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing\n")


def test_traffic_counts_slices_not_wholes():
    read = program(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i[0].astype(int), 1), (1000, 1000), (1,))
    assert read.hbm_bytes < 1000 * 1000 * 4
    assert np.isfinite(read.hbm_bytes)
