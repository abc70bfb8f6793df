"""Traffic read from HLO text: a text written by hand, and programs that XLA compiles here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.analysis import hlo
from rlhf_jax.devices import parallel

# A loop of 7 turns around one of 3, as XLA for TPUs writes them: without trip counts, and with what lies on the chip
# itself as S(1).
NESTED = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%fused_slice (stacked: f32[3,8,16], n: s32[]) -> f32[8,16] {
  %stacked = f32[3,8,16]{2,1,0:T(8,128)} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %one = f32[1,8,16]{2,1,0:T(8,128)} dynamic-slice(%stacked, %n, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %layer = f32[8,16]{1,0:T(8,128)} bitcast(%one)
}

%fused_write (all: f32[3,8,16], new: f32[1,8,16], at: s32[]) -> f32[3,8,16] {
  %all = f32[3,8,16]{2,1,0:T(8,128)} parameter(0)
  %new = f32[1,8,16]{2,1,0:T(8,128)} parameter(1)
  %at = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %written = f32[3,8,16]{2,1,0:T(8,128)} dynamic-update-slice(%all, %new, %at, %zero.1, %zero.1)
}

%inner_condition (carry: (s32[], f32[3,8,16])) -> pred[] {
  %carry = (s32[]{:T(128)}, f32[3,8,16]{2,1,0:T(8,128)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %turns = s32[]{:T(128)} constant(3)
  ROOT %going = pred[]{:T(512)} compare(%turn, %turns), direction=LT
}

%inner_body (carry.1: (s32[], f32[3,8,16])) -> (s32[], f32[3,8,16]) {
  %carry.1 = (s32[]{:T(128)}, f32[3,8,16]{2,1,0:T(8,128)}) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %weights = f32[3,8,16]{2,1,0:T(8,128)} get-tuple-element(%carry.1), index=1
  %layer.1 = f32[8,16]{1,0:T(8,128)S(1)} fusion(%weights, %turn.1), kind=kLoop, calls=%fused_slice
  %whole = f32[32,16]{1,0:T(8,128)S(1)} all-gather(%layer.1), replica_groups=[2,4]<=[8], dimensions={0}
  %back = f32[1,8,16]{2,1,0:T(8,128)S(1)} reduce-scatter(%whole), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %kept = f32[3,8,16]{2,1,0:T(8,128)} fusion(%weights, %back, %turn.1), kind=kLoop, calls=%fused_write
  %one.1 = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%turn.1, %one.1)
  ROOT %result = (s32[]{:T(128)}, f32[3,8,16]{2,1,0:T(8,128)}) tuple(%next, %kept)
}

%outer_condition (carry.2: (s32[], s32[], f32[3,8,16])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[3,8,16]{2,1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%carry.2), index=1
  %limit = s32[]{:T(128)} constant(9)
  ROOT %more = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

%outer_body (carry.3: (s32[], s32[], f32[3,8,16])) -> (s32[], s32[], f32[3,8,16]) {
  %carry.3 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[3,8,16]{2,1,0:T(8,128)}) parameter(0)
  %same = s32[]{:T(128)} get-tuple-element(%carry.3), index=0
  %count.1 = s32[]{:T(128)} get-tuple-element(%carry.3), index=1
  %held = f32[3,8,16]{2,1,0:T(8,128)} get-tuple-element(%carry.3), index=2
  %none = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, f32[3,8,16]{2,1,0:T(8,128)}) tuple(%none, %held)
  %loop = (s32[], /*index=1*/f32[3,8,16]) while(%begin), condition=%inner_condition, body=%inner_body
  %after = f32[3,8,16]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
  %one.2 = s32[]{:T(128)} constant(1)
  %next.1 = s32[]{:T(128)S(6)} add(%count.1, %one.2)
  ROOT %result.1 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[3,8,16]{2,1,0:T(8,128)}) tuple(%same, %next.1, %after)
}

ENTRY %main (state: f32[3,8,16]) -> (f32[3,8,16], f32[40]) {
  %state = f32[3,8,16]{2,1,0:T(8,128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %first = s32[]{:T(128)} copy(%two)
  %begin.1 = (s32[]{:T(128)}, s32[]{:T(128)}, f32[3,8,16]{2,1,0:T(8,128)}) tuple(%two, %first, %state)
  %loop.1 = (s32[], s32[], f32[3,8,16]) while(%begin.1), condition=%outer_condition, body=%outer_body
  %done = f32[3,8,16]{2,1,0:T(8,128)} get-tuple-element(%loop.1), index=2
  %sums = f32[10]{0:T(128)S(1)} constant({...})
  %shared = f32[10]{0:S(1)} all-reduce(%sums), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
  %start = (f32[10]{0:S(1)}, f32[40]{0:S(5)}) all-gather-start(%shared), GROUPS, dimensions={0}
  %gathered = f32[40]{0:T(128)S(5)} all-gather-done(%start)
  %there = (f32[10]{0:S(1)}, f32[10]{0:S(1)}, u32[]{:S(2)}) collective-permute-start(%shared), PAIRS
  %here = f32[10]{0:T(128)S(1)} collective-permute-done(%there)
  ROOT %out = (f32[3,8,16]{2,1,0:T(8,128)}, f32[40]{0:T(128)S(5)}) tuple(%done, %gathered)
}
""".replace("GROUPS", "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}").replace(
    "PAIRS", "source_target_pairs={{0,1},{1,0}}"
)

# A gather that begins, goes on beside other work, and ends, of one channel; and a sum of which each keeps a part.
STEPS = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%begins (part: f32[4,8]) -> (f32[4,8], f32[16,8], u32[]) {
  %part = f32[4,8]{1,0} parameter(0)
  %all-gather.1 = f32[16,8]{1,0} all-gather(%part), GROUPS
  ROOT %begun = (f32[4,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), TARGET="AsyncCollectiveStart"
}

%goes_on (part.1: f32[4,8], whole.1: f32[16,8], flag.1: u32[], other: f32[10]) -> (f32[10], f32[16,8], u32[]) {
  %part.1 = f32[4,8]{1,0} parameter(0)
  %whole.1 = f32[16,8]{1,0} parameter(1)
  %flag.1 = u32[]{:S(2)} parameter(2)
  %other = f32[10]{0} parameter(3)
  %all-gather.2 = f32[16,8]{1,0} all-gather(%part.1), GROUPS
  %twice = f32[10]{0} add(%other, %other)
  ROOT %went = (f32[10]{0}, f32[16,8]{1,0}, u32[]{:S(2)}) tuple(%twice, %all-gather.2, %flag.1)
}

%ends (part.2: f32[4,8], whole.2: f32[16,8], flag.2: u32[]) -> f32[16,8] {
  %part.2 = f32[4,8]{1,0} parameter(0)
  %whole.2 = f32[16,8]{1,0} parameter(1)
  %flag.2 = u32[]{:S(2)} parameter(2)
  %all-gather.3 = f32[16,8]{1,0} all-gather(%part.2), GROUPS
  ROOT %ended = f32[16,8]{1,0} custom-call(%all-gather.3, %whole.2, %flag.2), TARGET="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (input: f32[16,8]) -> f32[4,8] {
  %input = f32[16,8]{1,0} parameter(0)
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%input), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[4,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={4,8}
}

ENTRY %main (p: f32[4,8], q: f32[10]) -> (f32[10], f32[4,8]) {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[10]{0} parameter(1)
  %one = (f32[4,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%begins
  %w = f32[16,8]{1,0} get-tuple-element(%one), index=1
  %f = u32[]{:S(2)} get-tuple-element(%one), index=2
  %two = (f32[10]{0}, f32[16,8]{1,0}, u32[]{:S(2)}) fusion(%p, %w, %f, %q), kind=kOutput, calls=%goes_on
  %r = f32[10]{0} get-tuple-element(%two), index=0
  %whole = f32[16,8]{1,0} fusion(%p, %w, %f), kind=kCustom, calls=%ends
  %kept = f32[4,8]{1,0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (f32[10]{0}, f32[4,8]{1,0}) tuple(%r, %kept)
}
""".replace("GROUPS", 'channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}')


def test_a_collective_in_steps_is_one():
    found = hlo.traffic(STEPS)
    part, whole, other = 4 * 8 * 4, 16 * 8 * 4, 10 * 4
    assert found.counts == {"all-gather": 1, "reduce-scatter": 1}
    assert found.collectives == {"all-gather": whole, "reduce-scatter": whole}
    assert found.sent == 2 * whole * 3 / 4
    assert found.waits == {"reduce-scatter": whole}  # the gather goes on beside other work
    assert found.memory == (part + whole) + 2 * other + (whole + part)


def test_loops_count_as_often_as_they_run():
    found = hlo.traffic(NESTED)
    turns = 7 * 3
    assert found.counts == {
        "all-gather": turns + 1,
        "reduce-scatter": turns,
        "all-reduce": 1,
        "collective-permute": 1,
    }
    whole = 32 * 16 * 4
    assert found.collectives == {
        "all-gather": turns * whole + 160,
        "reduce-scatter": turns * whole,
        "all-reduce": 40,
        "collective-permute": 40,
    }
    assert found.waits == {"all-gather": turns * whole, "reduce-scatter": turns * whole, "all-reduce": 40}


WRAPPED = """HloModule wrapped

%exchange (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %exchanged = f32[8]{0} all-to-all(%x), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %begun = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%exchange
  ROOT %done = f32[8]{0} async-done(%begun)
}
"""


def test_nothing_waits_for_a_collective_in_a_computation_that_is_started():
    found = hlo.traffic(WRAPPED)
    assert found.collectives == {"all-to-all": 32} and found.waits == {}


def test_what_a_device_sends():
    whole = 32 * 16 * 4
    loops = 7 * 3 * 2 * whole * 3 / 4  # gathered, and scattered, among 4
    assert hlo.traffic(NESTED).sent == loops + 160 * 3 / 4 + 40 * 2 * 1 / 2 + 40


def test_slices_and_updates_of_what_is_stacked_count_for_themselves():
    layer, scalar = 8 * 16 * 4, 4
    found = hlo.traffic(NESTED)
    counters = 7 * 3 * 4 * scalar + 7 * 2 * scalar + 2 * scalar  # places in the stack, sums; sums; a copy
    assert found.memory == 7 * 3 * 2 * layer + counters
    assert found.host == 160  # what was gathered


RELAID = """HloModule relaid

%copied (input: s8[3,8,16]) -> s8[3,8,16] {
  %input = s8[3,8,16]{2,1,0:T(32,128)} parameter(0)
  ROOT %copy = s8[3,8,16]{2,1,0:T(8,128)} copy(%input)
}

%sliced (stacked: s8[3,8,16], n: s32[]) -> s8[1,8,16] {
  %stacked = s8[3,8,16]{2,1,0:T(32,128)} parameter(0)
  %relaid = s8[3,8,16]{2,1,0:T(8,128)} fusion(%stacked), kind=kLoop, calls=%copied
  %n = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %layer = s8[1,8,16]{2,1,0:T(8,128)} dynamic-slice(%relaid, %n, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

ENTRY %main (all: s8[3,8,16], turn: s32[]) -> s8[3,8,16] {
  %all = s8[3,8,16]{2,1,0:T(32,128)} parameter(0)
  %turn = s32[]{:T(128)} parameter(1)
  %one = s8[1,8,16]{2,1,0:T(8,128)S(1)} fusion(%all, %turn), kind=kLoop, calls=%sliced
  %begun = ((s8[3,8,16]{2,1,0}), s8[2,8,16]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%all), slice={[0:2], [0:8], [0:16]}
  %fetched = s8[2,8,16]{2,1,0:S(1)} slice-done(%begun)
  ROOT %whole = s8[3,8,16]{2,1,0:T(8,128)} fusion(%all), kind=kLoop, calls=%copied
}
"""


def test_of_a_copy_within_a_fusion_and_of_a_slice_beforehand_counts_what_is_read():
    layer, counter = 8 * 16, 4
    assert hlo.traffic(RELAID).memory == layer + counter + 2 * layer + 2 * 3 * layer  # and then a copy of all


@pytest.mark.parametrize(
    ("shape", "device"),
    [
        ("f32[2,3]{1,0:T(8,128)}", 24),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 0),
        ("(s8[5], pred[2]{0}, /*index=2*/u32[]{:S(2)}, f8e4m3fn[3]{0}, token[])", 10),
        ("f32[4]{0:T(128)S(5)}", 0),
        ("s4[4]{0:E(4)}", 2),
    ],
)
def test_bytes_of_shapes(shape, device):
    assert hlo.size(shape, "device") == device


def test_a_compiled_loop_of_sums():
    def step(x, axis):
        return jax.lax.scan(lambda x, _: (parallel.psum(x * 0.5, axis), None), x, None, length=5)[0]

    x = jax.ShapeDtypeStruct((8, 6, 3), jnp.float32)
    found = hlo.traffic(parallel.pmap(step).lower(x).compile().as_text())
    assert found.collectives == {"all-reduce": 5 * 6 * 3 * 4}
    assert found.sent == 2 * 7 / 8 * 5 * 6 * 3 * 4


def test_a_compiled_gather_of_two_groups():
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), (jax.sharding.AxisType.Auto,) * 2)
    gather = jax.shard_map(
        lambda x: jax.lax.all_gather(x, "columns"),
        mesh=mesh,
        in_specs=PartitionSpec("rows", "columns"),
        out_specs=PartitionSpec("rows"),
        check_vma=False,
    )
    found = hlo.traffic(jax.jit(gather).lower(jnp.zeros((2, 12))).compile().as_text())
    assert found.collectives == {"all-gather": 4 * 3 * 4}
    assert found.sent == 3 / 4 * 4 * 3 * 4


def test_a_compiled_product_moves_its_arrays_once():
    shapes = (64, 32), (32, 48)
    compiled = jax.jit(jnp.matmul).lower(*(jnp.zeros(shape) for shape in shapes)).compile()
    assert hlo.traffic(compiled.as_text()).memory == 4 * (64 * 32 + 32 * 48 + 64 * 48)
