"""HLO texts written by hand, small enough to price on paper.

The chip of the tests is a v5e: 197e12 FLOP/s, 819e9 bytes/s of HBM, 45e9 of a link.
"""

CLOCK = 197e12 / 131072


def op(line: str, cycles: int | None = None, name: str = '', frame: int | None = None) -> str:
  """An op's line with the attributes the compiler would add."""
  metadata = f'op_name="{name}"' if name else ''
  if frame is not None:
    metadata += f' stack_frame_id={frame}'
  line += f', metadata={{{metadata}}}' if metadata else ''
  if cycles is not None:
    line += (f', backend_config={{"flag_configs":[],"window_config":{{"estimated_cycles":'
             f'"{cycles}"}}}}')
  return '  ' + line


HEADER = 'HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}\n'

FRAMES = """
FileNames
1 "retro_jax/models/layers.py"

FunctionNames
1 "DecoderLayer.__call__"
2 "FeedForward.__call__"
3 "NeighborEncoder.__call__"
4 "scale_by_adam.<locals>.update_fn"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
2 {file_name_id=1 function_name_id=2 line=2 end_line=2 column=1 end_column=1}
3 {file_name_id=1 function_name_id=3 line=3 end_line=3 column=1 end_column=1}
4 {file_name_id=1 function_name_id=4 line=4 end_line=4 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=1}
4 {file_location_id=2 parent_frame_id=4}
5 {file_location_id=4 parent_frame_id=1}

"""

_MATMUL = ('bf16[256,512]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf')

# A loop of five matrix products of 256 x 1024 x 512, then one after it.
LOOP = HEADER + FRAMES + f"""
%matmul (x: bf16[256,1024], w: bf16[1024,512]) -> bf16[256,512] {{
  %x = bf16[256,1024]{{1,0:T(8,128)(2,1)}} parameter(0)
  %w = bf16[1024,512]{{1,0:T(8,128)(2,1)}} parameter(1)
{op('ROOT %convolution.1 = ' + _MATMUL)}
}}

%body (state: (s32[], bf16[256,1024], bf16[1024,512])) -> (s32[], bf16[256,1024], bf16[1024,512]) {{
  %state = (s32[]{{:T(128)}}, bf16[256,1024]{{1,0:T(8,128)(2,1)}}, /*index=2*/bf16[1024,512]{{1,0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %a = bf16[256,1024]{{1,0:T(8,128)(2,1)}} get-tuple-element(%state), index=1
  %b = bf16[1024,512]{{1,0:T(8,128)(2,1)}} get-tuple-element(%state), index=2
{op('%fusion.1 = bf16[256,512]{1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kOutput, calls=%matmul',
    4000, 'jit(step)/jvp()/while/body/dot_general', 2)}
  ROOT %next = (s32[]{{:T(128)}}, bf16[256,1024]{{1,0}}, bf16[1024,512]{{1,0}}) tuple(%i, %a, %b)
}}

%condition (state.1: (s32[], bf16[256,1024], bf16[1024,512])) -> pred[] {{
  %state.1 = (s32[]{{:T(128)}}, bf16[256,1024]{{1,0}}, bf16[1024,512]{{1,0}}) parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  %trips = s32[]{{:T(128)}} constant(5)
  ROOT %less = pred[]{{:T(512)}} compare(%i.1, %trips), direction=LT
}}

ENTRY %main (p: (s32[], bf16[256,1024], bf16[1024,512])) -> bf16[256,512] {{
  %p = (s32[]{{:T(128)}}, bf16[256,1024]{{1,0}}, bf16[1024,512]{{1,0}}) parameter(0)
  %while.1 = (s32[]{{:T(128)}}, bf16[256,1024]{{1,0}}, bf16[1024,512]{{1,0}}) while(%p), condition=%condition, body=%body
  %a.2 = bf16[256,1024]{{1,0:T(8,128)(2,1)}} get-tuple-element(%while.1), index=1
  %b.2 = bf16[1024,512]{{1,0:T(8,128)(2,1)}} get-tuple-element(%while.1), index=2
{op('ROOT %fusion.2 = bf16[256,512]{1,0:T(8,128)(2,1)} fusion(%a.2, %b.2), kind=kOutput, '
    'calls=%matmul', 6000, 'jit(step)/transpose(jvp())/dot_general', 4)}
}}
"""

# An all-gather over all four devices beside one op, an all-reduce beside none, and a
# reduce-scatter as the TPU compiler writes it.
COLLECTIVES = HEADER + f"""
%add (l: f32[], r: f32[]) -> f32[] {{
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %sum = f32[] add(%l, %r)
}}

%start (s: f32[1024,1024]) -> (f32[1024,1024], f32[4096,1024], u32[]) {{
  %s = f32[1024,1024]{{1,0:T(8,128)}} parameter(0)
  %all-gather.1 = f32[4096,1024]{{1,0:T(8,128)}} all-gather(%s), channel_id=1, replica_groups=mesh['axis_0'=4] {{'axis_0'}}, dimensions={{0}}
  ROOT %begin = (f32[1024,1024]{{1,0}}, f32[4096,1024]{{1,0}}, u32[]{{:S(2)}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%done (t: f32[1024,1024], u: f32[4096,1024], v: u32[]) -> f32[4096,1024] {{
  %t = f32[1024,1024]{{1,0:T(8,128)}} parameter(0)
  %u = f32[4096,1024]{{1,0:T(8,128)}} parameter(1)
  %v = u32[]{{:S(2)}} parameter(2)
  %all-gather.2 = f32[4096,1024]{{1,0:T(8,128)}} all-gather(%t), channel_id=1, replica_groups=mesh['axis_0'=4] {{'axis_0'}}, dimensions={{0}}
  ROOT %end = f32[4096,1024]{{1,0:T(8,128)}} custom-call(%t, %u, %all-gather.2, %v), custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter (y: f32[4096,1024]) -> f32[1024,1024] {{
  %y = f32[4096,1024]{{1,0:T(8,128)}} parameter(0)
  %all-reduce.9 = f32[4096,1024]{{1,0:T(8,128)}} all-reduce(%y), channel_id=3, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %mine = f32[1024,1024]{{1,0:T(8,128)}} dynamic-slice(%all-reduce.9, %id, %zero), dynamic_slice_sizes={{1024,1024}}
}}

%negative (n: f32[1024,1024]) -> f32[1024,1024] {{
  %n = f32[1024,1024]{{1,0:T(8,128)S(1)}} parameter(0)
  ROOT %negate.1 = f32[1024,1024]{{1,0:T(8,128)S(1)}} negate(%n)
}}

ENTRY %main (q: f32[1024,1024]) -> f32[1024,1024] {{
  %q = f32[1024,1024]{{1,0:T(8,128)S(1)}} parameter(0)
  %async-collective-start = (f32[1024,1024]{{1,0}}, f32[4096,1024]{{1,0}}, u32[]{{:S(2)}}) fusion(%q), kind=kCustom, calls=%start
  %g0 = f32[1024,1024]{{1,0:T(8,128)}} get-tuple-element(%async-collective-start), index=0
  %g1 = f32[4096,1024]{{1,0:T(8,128)}} get-tuple-element(%async-collective-start), index=1
  %g2 = u32[]{{:S(2)}} get-tuple-element(%async-collective-start), index=2
{op('%beside = f32[1024,1024]{1,0:T(8,128)S(1)} fusion(%q), kind=kLoop, calls=%negative', 60000)}
  %async-collective-done = f32[4096,1024]{{1,0:T(8,128)}} fusion(%g0, %g1, %g2), kind=kCustom, calls=%done
  %all-reduce.1 = f32[1024,1024]{{1,0:T(8,128)}} all-reduce(%q), channel_id=2, replica_groups=[2,2]<=[4], to_apply=%add
  %scattered = f32[1024,1024]{{1,0:T(8,128)}} fusion(%async-collective-done), kind=kCustom, calls=%all-reduce-scatter
  ROOT %copy.1 = f32[1024,1024]{{1,0:T(8,128)}} bitcast(%scattered)
}}
"""

# A Pallas kernel whose attributes contain newlines, braces at the start of a line and strings;
# a SparseCore collective; an op behind them that a careless parser would lose.
PALLAS = HEADER + f"""
%sparse (s: f32[256,128]) -> f32[1024,128] {{
  %s = f32[256,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %all-gather.7 = f32[1024,128]{{1,0:T(8,128)}} all-gather(%s), channel_id=7, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
}}, execution_thread="sparsecore"

ENTRY %main (q: bf16[8,512,128]) -> bf16[8,512,128] {{
  %q = bf16[8,512,128]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %k = bf16[8,512,128]{{2,1,0:T(8,128)(2,1)}} parameter(1)
  %s0 = f32[256,128]{{1,0:T(8,128)}} parameter(2)
  %call-start = ((f32[256,128]{{1,0}}), f32[1024,128]{{1,0}}, s32[]) call-start(%s0), async_execution_thread="sparsecore", to_apply=%sparse
  %splash_mha_fwd_residuals.3 = (f32[8,512]{{1,0}}, bf16[8,512,128]{{2,1,0:T(8,128)(2,1)}}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata": "{{\\"block_q\\": 512}}",
"note": "a }} in a string,
and a line of it"
}}
}}, metadata={{op_name="jit(step)/jvp()/attention/pallas_call"}}
  %cost.1 = bf16[8,512,128]{{2,1,0:T(8,128)(2,1)}} custom-call(%q), custom_call_target="tpu_custom_call", backend_config={{"custom_call_config":{{"body":"TUzvUg==","cost_estimate":{{"flops":"1000000000","transcendentals":"0","bytes_accessed":"10"}}}}}}
  %call-done = f32[1024,128]{{1,0:T(8,128)}} call-done(%call-start)
{op('ROOT %last = bf16[8,512,128]{2,1,0:T(8,128)(2,1)S(1)} copy(%cost.1)', 1000)}
}}
"""
