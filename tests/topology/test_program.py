"""The parser of scheduled HLO: what it reads, and that nothing is lost without a word."""

import pytest

from retro_jax.topology import program
from retro_jax.topology.program import ProgramError
from tests.topology import texts


def test_computations_in_schedule_order():
  parsed = program.parse(texts.LOOP)
  assert list(parsed.computations) == ['matmul', 'body', 'condition', 'main']
  assert [op.name for op in parsed.entry.ops] == ['p', 'while.1', 'a.2', 'b.2', 'fusion.2']
  assert parsed.unparsed == ()
  fusion = parsed.entry.root
  assert (fusion.opcode, fusion.operands, fusion.called) == ('fusion', ('a.2', 'b.2'), ('matmul',))
  assert fusion.estimated_cycles == 6000
  assert fusion.op_name == 'jit(step)/transpose(jvp())/dot_general'


def test_types_with_layouts_and_comments():
  loop = program.parse(texts.LOOP).entry.ops[1]
  assert [(a.dtype, a.dims, a.num_bytes) for a in loop.results] == [
      ('s32', (), 4), ('bf16', (256, 1024), 2 * 256 * 1024), ('bf16', (1024, 512), 1024 * 1024)]
  spaces = program.arrays('(f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}, f8e4m3fn[4]{0})')
  assert [a.space for a in spaces] == [1, 0, 2, 0] and spaces[3].num_bytes == 4


def test_trip_count():
  parsed = program.parse(texts.LOOP)
  assert parsed.trip_count(parsed.entry.ops[1]) == 5
  known = texts.LOOP.replace(
      'body=%body\n', 'body=%body, backend_config={"known_trip_count":{"n":"7"}}\n')
  parsed = program.parse(known)
  assert parsed.trip_count(parsed.entry.ops[1]) == 7


def test_trip_count_inside_a_fusion():
  parsed = program.parse(texts.LOOP.replace(
      '%condition (', '''%less.1 (c: s32[]) -> pred[] {
  %c = s32[] parameter(0)
  %bound = s32[] constant(9)
  ROOT %compare.1 = pred[] compare(%c, %bound), direction=LT
}

%condition (''').replace('compare(%i.1, %trips), direction=LT',
                         'fusion(%i.1), kind=kLoop, calls=%less.1'))
  assert parsed.trip_count(parsed.entry.ops[1]) == 9


def test_a_loop_without_a_bound_is_an_error():
  parsed = program.parse(texts.LOOP.replace('%trips = s32[]{:T(128)} constant(5)',
                                            '%trips = s32[]{:T(128)} add(%i.1, %i.1)'))
  with pytest.raises(ProgramError, match='no trip count found for the loop while.1'):
    parsed.trip_count(parsed.entry.ops[1])


def test_stack_frames():
  parsed = program.parse(texts.LOOP)
  inner = parsed.computations['body'].by_name['fusion.1']
  assert parsed.functions(inner) == ('FeedForward.__call__', 'DecoderLayer.__call__')
  assert parsed.functions(parsed.entry.root) == ('FeedForward.__call__', 'NeighborEncoder.__call__')


def test_attributes_with_newlines_lose_no_op():
  parsed = program.parse(texts.PALLAS)
  assert [op.name for op in parsed.entry.ops] == [
      'q', 'k', 's0', 'call-start', 'splash_mha_fwd_residuals.3', 'cost.1', 'call-done', 'last']
  kernel = parsed.entry.ops[4]
  assert kernel.target == 'tpu_custom_call' and kernel.op_name.endswith('attention/pallas_call')
  assert parsed.unparsed == ()


def test_lines_that_are_not_understood():
  assert program.parse('what is this?\n' + texts.LOOP).unparsed == ('what is this?',)
  with pytest.raises(ProgramError, match='not an HLO op: what is this'):
    program.parse(texts.LOOP.replace('  %i = s32', 'what is this?\n  %i = s32'))
  with pytest.raises(ProgramError, match='does not end'):
    program.parse(texts.LOOP.rstrip().removesuffix('}'))
  with pytest.raises(ProgramError, match='no ENTRY'):
    program.parse(texts.LOOP.replace('ENTRY ', ''))


def test_a_missing_computation_is_an_error():
  parsed = program.parse(texts.LOOP.replace('calls=%matmul', 'calls=%matmull'))
  with pytest.raises(ProgramError, match='fusion.2 calls matmull, which is not in the text'):
    parsed.called(parsed.entry.root)
