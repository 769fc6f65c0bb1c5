"""The price of programs written by hand, against sums done on paper."""

import json

import pytest

from retro_jax.topology import arithmetic, chips, cost, network, program, replay
from retro_jax.topology.program import Array, ProgramError
from tests.topology import texts

TOPOLOGY = chips.parse('v5e:2x2')
# In the order of a mesh whose neighbours are neighbours on the torus.
COORDINATES = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
HBM = 0.8 * 819e9


def run(text, topology=TOPOLOGY):
  return replay.Replay(program.parse(text), topology, COORDINATES)


def test_loops_multiply_and_hbm_bounds_the_blend():
  result = run(texts.LOOP)
  flops = 2 * 256 * 1024 * 512
  moved = 2 * (256 * 1024 + 1024 * 512 + 256 * 512)
  assert result.loops == [('while.1', 5)]
  assert result.mxu_flops == 6 * flops
  assert result.hbm_bytes == 6 * moved
  # 4,000 cycles are less than HBM needs, 6,000 more; the FLOPs alone would need half of that.
  assert flops / 197e12 < 4000 / texts.CLOCK < moved / HBM < 6000 / texts.CLOCK
  assert result.seconds == pytest.approx(5 * 4000 / texts.CLOCK + moved / HBM)
  assert result.seconds_raw == pytest.approx((5 * 4000 + 6000) / texts.CLOCK)


def test_a_compute_bound_op_takes_its_cycles():
  result = run(texts.LOOP.replace('bf16[256,', 'bf16[8192,'))
  assert result.seconds == result.seconds_raw == pytest.approx((5 * 4000 + 6000) / texts.CLOCK)


def test_where_the_time_goes():
  rows = run(texts.LOOP).rows
  assert set(rows) == {('forward', 'ffw'), ('backward', 'encoder')}
  assert rows['forward', 'ffw'].mxu_flops == 5 * rows['backward', 'encoder'].mxu_flops


@pytest.mark.parametrize('name, expected', [
    ('jit(step)/jvp()/checkpoint/rematted_computation/mul', ('recompute', 'ffw')),
    ('jit(step)/transpose(jvp())/mul', ('backward', 'ffw')),
    ('jit(step)/add', ('forward', 'ffw'))])
def test_passes(name, expected):
  rows = run(texts.LOOP.replace('jit(step)/jvp()/while/body/dot_general', name)).rows
  assert expected in rows


def test_the_update_is_the_optimizers():
  text = texts.LOOP.replace('jit(step)/jvp()/while/body/dot_general" stack_frame_id=2',
                            'jit(step)/sqrt" stack_frame_id=5')
  assert ('update', 'optimizer') in run(text).rows


def test_a_collective_hides_behind_compute_between_start_and_done():
  traffic = run(texts.COLLECTIVES).traffic
  gather = traffic['all-gather']
  # Each device sends its 4 MiB to three others over one link in x and one in y.
  assert (gather.count, gather.num_bytes) == (1, 3 * 2 ** 22)
  seconds = 3 * 2 ** 22 / (2 * 45e9) + 4 * network.HOP_SECONDS
  assert gather.seconds == pytest.approx(seconds)
  assert gather.exposed_seconds == pytest.approx(seconds - 60_000 / texts.CLOCK)


def test_a_collective_without_a_start_is_exposed():
  result = run(texts.COLLECTIVES)
  reduce = result.traffic['all-reduce']
  assert (reduce.count, reduce.num_bytes) == (1, 2 ** 22)
  assert reduce.exposed_seconds == pytest.approx(2 ** 22 / 45e9 + 2 * network.HOP_SECONDS)


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
  scatter = run(texts.COLLECTIVES).traffic['reduce-scatter']
  assert (scatter.count, scatter.num_bytes) == (1, 2 ** 24 * 3 / 4)


def test_seconds_are_compute_and_exposed_collectives():
  result = run(texts.COLLECTIVES)
  assert result.exposed_collective_seconds == pytest.approx(
      sum(kind.exposed_seconds for kind in result.traffic.values()))
  assert result.seconds == pytest.approx(60_000 / texts.CLOCK + result.exposed_collective_seconds)


def test_pallas_kernels_and_sparse_core_collectives():
  result = run(texts.PALLAS)
  assert result.pallas == {'splash_mha_fwd_residuals': 1, 'cost': 1}
  assert not result.unknown_kernels
  attention = 2 * 2 * (8 * 512 * 512 / 2) * 128
  assert result.mxu_flops == attention + 1e9
  moved = 4 * 2 ** 20 + 8 * 512 * 4  # q, k, v, the output and its row sums: HBM is slower here
  peak = 0.55 * 197e12
  assert attention / peak < moved / HBM
  assert result.kernel_seconds == pytest.approx(moved / HBM + 1e9 / peak)
  assert result.traffic['all-gather'].num_bytes == 3 * 2 ** 17
  assert result.traffic['all-gather'].exposed_seconds == 0
  assert result.seconds == pytest.approx(result.kernel_seconds + 1000 / texts.CLOCK)


def test_unknown_kernels_and_calls_are_told():
  text = texts.PALLAS.replace('splash_mha_fwd', 'mystery').replace(
      'custom-call(%q), custom_call_target="tpu_custom_call"',
      'custom-call(%q), custom_call_target="Surprise"')
  doubts = ' '.join(priced(text).doubts)
  assert 'unknown FLOPs, counted as waiting for HBM: mystery_residuals x 1' in doubts
  assert 'custom calls counted as nothing: Surprise x 1' in doubts


def test_kernels_in_interpreted_form_are_told():
  text = texts.LOOP.replace('dot_general', 'splash_mha_fwd/while/body/dot_general')
  assert 'lowered in interpreted form' in ' '.join(priced(text).doubts)
  assert not priced(texts.LOOP).doubts


def test_of_a_conditional_the_longest_branch_counts():
  text = texts.HEADER + f"""
%short (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0:T(128)S(1)}} parameter(0)
{texts.op('ROOT %c1 = f32[8]{0:T(128)S(1)} copy(%a)', 100)}
}}

%long (b: f32[8]) -> f32[8] {{
  %b = f32[8]{{0:T(128)S(1)}} parameter(0)
{texts.op('ROOT %c2 = f32[8]{0:T(128)S(1)} copy(%b)', 900)}
}}

%none (d: f32[8]) -> f32[8] {{
  ROOT %d = f32[8]{{0:T(128)S(1)}} parameter(0)
}}

ENTRY %main (x: f32[8], i: s32[]) -> f32[8] {{
  %x = f32[8]{{0:T(128)S(1)}} parameter(0)
  %i = s32[] parameter(1)
{texts.op('ROOT %one = f32[8]{0:T(128)S(1)} conditional(%i, %x, %x, %x), '
          'branch_computations={%short, %long, %none}')}
}}
"""
  result = run(text)
  assert result.seconds == result.seconds_raw == pytest.approx(900 / texts.CLOCK)


def priced(text):
  memory = cost.Memory(arguments=3 * 2 ** 30, temporaries=2 ** 30, outputs=2 ** 30, aliased=2 ** 30)
  return cost.of_program(program.parse(text), TOPOLOGY, COORDINATES, memory,
                         model_flops=4 * 5 * 2 * 256 * 1024 * 512, compile_seconds=1.5)


def test_report():
  report = priced(texts.LOOP)
  assert report.fits and report.hbm_bytes_per_device == 4 * 2 ** 30
  assert report.mxu_flops_over_model_flops == pytest.approx(6 / 5)
  assert report.estimated_mfu == pytest.approx(
      report.model_flops_per_step / (4 * 197e12 * report.estimated_step_seconds))
  assert report.estimated_mfu > report.estimated_mfu_raw
  keys = json.loads(json.dumps(report.to_json())).keys()
  assert keys >= {
      'fits', 'hbm_bytes_per_device', 'hbm_capacity_bytes', 'model_flops_per_step',
      'mxu_flops_over_model_flops', 'collective_bytes_per_device', 'collective_counts',
      'exposed_collective_seconds', 'estimated_step_seconds', 'estimated_step_seconds_raw',
      'estimated_mfu', 'estimated_mfu_raw', 'compile_seconds', 'time_by_source'}
  lines = cost.table(report).splitlines()
  assert lines[1].startswith('fits: 4.00 of 15.75 GiB')
  assert any(line.split()[:1] == ['ffw'] for line in lines)
  seconds = sum(row.seconds for row in report.time_by_source)
  assert seconds == pytest.approx(report.estimated_step_seconds)


GROUPS = {
    "replica_groups={{0,2},{1,3}}": (0, 2),
    "replica_groups={}": (0, 1, 2, 3),
    "replica_groups=[2,2]<=[4]": (0, 1),
    "replica_groups=[2,2]<=[2,2]T(1,0)": (0, 2),
    "replica_groups=mesh['a'=2,'b'=2] {'a'}": (0, 2),
    "replica_groups=mesh['a'=2,'b'=2] {'b'}": (0, 1),
    "replica_groups=mesh['a'=2,'b'=2] {'a','b'}": (0, 1, 2, 3),
    "replica_groups=mesh['a'=8,'b'=2] {'a':(1)2}": (0, 8),
    "replica_groups=mesh['a'=8,'b'=2] {'a':(2)4}": (0, 2, 4, 6),
    # Places of the mesh in the order 0, 2, 1, 3 of devices.
    "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}": (0, 1),
    "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}": (0, 2),
    "replica_groups=mesh['a'=2,'b'=2], device_ids=([4]) {'a'}": (0, 2),
    "source_target_pairs={{0,3},{3,0}}": (0, 3)}


@pytest.mark.parametrize('text, group', GROUPS.items())
def test_replica_groups(text, group):
  parsed = program.parse(texts.COLLECTIVES.replace('replica_groups=[2,2]<=[4]', text))
  assert network.replica_group(parsed.entry.by_name['all-reduce.1'], 4) == group


def test_unknown_replica_groups_are_an_error():
  with pytest.raises(ProgramError, match='unknown replica groups'):
    run(texts.COLLECTIVES.replace('replica_groups=[2,2]<=[4]', 'replica_groups=new_notation'))


def test_a_whole_axis_of_a_torus_is_a_ring():
  torus = chips.parse('v5p:4x4x4')
  coordinates = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
  assert network.spanned_axes(range(64), torus, coordinates) == (3, 0)
  assert network.spanned_axes(range(4), torus, coordinates) == (1, 0)
  assert network.spanned_axes(range(2), torus, coordinates) == (0, 1)
  assert network.spanned_axes(range(4), TOPOLOGY, COORDINATES) == (0, 2)


def test_a_convolution_that_is_a_batched_product_counts_only_taps_that_meet():
  # Two products of 4 x 8 x 16, the batch as a window of which one tap in two meets an input.
  left, right, out = (Array('bf16', dims) for dims in ((2, 4, 8), (2, 8, 16), (2, 4, 16)))
  attributes = ', window={size=2 stride=1 pad=1_1 lhs_dilate=2}, dim_labels=0bf_0io->0bf'
  taps = sum(0 <= o - 1 + k <= 2 and (o - 1 + k) % 2 == 0 for o in range(2) for k in range(2))
  assert taps == 2
  assert arithmetic.convolution_flops(left, right, out, attributes) == 2 * 4 * 8 * 16 * taps


def test_slices_of_a_buffer_count_as_slices():
  text = texts.HEADER + """
%update (b: f32[64,1024], s: f32[1,1024], i: s32[]) -> f32[64,1024] {
  %b = f32[64,1024]{1,0} parameter(0)
  %s = f32[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %dus = f32[64,1024]{1,0} dynamic-update-slice(%b, %s, %i, %z)
}

ENTRY %main (b: f32[64,1024], s: f32[1,1024], i: s32[]) -> f32[64,1024] {
  %b0 = f32[64,1024]{1,0} parameter(0)
  %s0 = f32[1,1024]{1,0} parameter(1)
  %i0 = s32[] parameter(2)
  ROOT %f = f32[64,1024]{1,0} fusion(%b0, %s0, %i0), kind=kLoop, calls=%update
}
"""
  assert run(text).hbm_bytes == 2 * 4096
