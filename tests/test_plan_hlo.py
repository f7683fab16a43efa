"""What is read from compiled programs equals what the programs were written to do."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qedjax.plan import costs, hlo
from qedjax.plan.collectives import collectives, group_size, sent_by_kind
from qedjax.sharding import MeshConfig, make_mesh

P = PartitionSpec


def compiled(function, *arguments, **options):
    """The module of a function of arrays (shape, spec) on a mesh of 4 x 2."""
    mesh = make_mesh(MeshConfig(fsdp=4, context=2))
    with jax.set_mesh(mesh):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec))) for shape, spec in arguments]
        return hlo.parse(jax.jit(function, **options).lower(*shapes).compile().as_text())


def local(function, inputs, outputs):
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)


def test_an_all_gather_in_a_loop_counts_once_a_trip():
    def body(w):
        def step(carry, _):
            whole = jax.lax.all_gather(w * carry[0, 0], 'fsdp', axis=0, tiled=True)
            return carry + whole[:8], None

        return jax.lax.scan(step, jnp.zeros((8, 16)), None, length=7)[0]

    module = compiled(local(body, (P('fsdp'),), P()), ((32, 16), ('fsdp',)))
    found = collectives(module)
    assert [(c.kind, c.bytes, c.group, c.count) for c in found] == [('all-gather', 32 * 16 * 4, 4, 7)]
    assert sent_by_kind(found) == {'all-gather': 7 * 32 * 16 * 4 * 3 / 4}


@pytest.mark.parametrize(('kind', 'call', 'sent'), [
    ('all-reduce', lambda x: jax.lax.psum(x, 'fsdp'), 2 * 3 / 4 * 4096),
    ('reduce-scatter', lambda x: jax.lax.psum_scatter(x, 'fsdp', scatter_dimension=0, tiled=True), 3 / 4 * 4096),
    ('all-to-all', lambda x: jax.lax.all_to_all(x, 'fsdp', 0, 0, tiled=True), 3 / 4 * 4096),
    ('collective-permute', lambda x: jax.lax.ppermute(x, 'fsdp', [(i, (i + 1) % 4) for i in range(4)]), 4096)])
def test_every_kind_is_counted_with_what_a_ring_sends(kind, call, sent):
    module = compiled(local(call, (P(),), P()), ((64, 16), ()))
    assert sent_by_kind(collectives(module)) == {kind: sent}


def test_groups_are_read_in_every_notation():
    assert group_size('replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}') == 4
    assert group_size('replica_groups=[2,4]<=[4,2]T(1,0)') == 4
    assert group_size("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}") == 4
    assert group_size("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}") == 8
    with pytest.raises(ValueError, match='cannot be read'):
        group_size('dimensions={0}')


TPU = """HloModule m, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, may-alias) }
%part (p: bf16[8,4]) -> bf16[8,16] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={1}, \
frontend_attributes={chain_id="5"}
}
%all-reduce-scatter (x: bf16[8,16]) -> bf16[8,4] {
  %x = bf16[8,16]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %all-reduce.1 = bf16[8,16]{1,0} all-reduce(%x), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[8,4]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,4}
}
%body (s: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %s = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %w = bf16[8,4]{1,0} get-tuple-element(%s), index=1
  %kernel = bf16[8,4]{1,0} custom-call(%w), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="f"}
  %start = bf16[8,16]{1,0} fusion(%w), kind=kCustom, calls=%part
  %done = bf16[8,16]{1,0} fusion(%w), kind=kCustom, calls=%part.2
  %back = bf16[8,4]{1,0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%i, /*index=1*/%back)
}
%condition (s.1: (s32[], bf16[8,4])) -> pred[] {
  %s.1 = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %many = s32[] constant(36)
  ROOT %lt = pred[] compare(%i.1, %many), direction=LT
}
ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %n = s32[] constant(0)
  %start.1 = (s32[], bf16[8,4]{1,0}) tuple(%n, %a)
  %while = (s32[], bf16[8,4]{1,0}) while(%start.1), condition=%condition, body=%body
  ROOT %out = bf16[8,4]{1,0} get-tuple-element(%while), index=1
}
""".replace('%part.2', '%part')


def test_what_tpus_fuse_counts_once_and_as_what_it_is():
    """Parts of one collective in two fusions; an all-reduce of which a slice is kept; attributes over several lines."""
    module = hlo.parse(TPU)
    found = [(c.kind, c.bytes, c.count, c.hidden) for c in collectives(module)]
    assert found == [('all-gather', 256, 36, True), ('reduce-scatter', 256, 36, False)]
    assert hlo.aliased_outputs(module) == 2
    assert next(hlo.arrays_of('bf16[8,4]{1,0:T(8,128)(2,1)S(1)}')) == hlo.Array('bf16', (8, 4), hbm=False)


def test_a_computation_of_another_core_ends_where_it_ends():
    text = TPU.replace('  ROOT %slice = bf16[8,4]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,4}\n}',
                       '  ROOT %slice = bf16[8,4]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,4}\n}, '
                       'execution_thread="sparsecore"')
    assert text != TPU
    assert collectives(hlo.parse(text)) == collectives(hlo.parse(TPU))


def test_a_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match='not the text'):
        hlo.parse('ENTRY')


def test_loops_that_data_end_count_once_and_are_named():
    module = hlo.parse(TPU.replace('direction=LT', 'direction=GT'))
    assert hlo.uncounted_loops(module) == ['while']
    assert {c.count for c in collectives(module)} == {1}
    assert not hlo.uncounted_loops(hlo.parse(TPU))


def test_flops_of_products_are_counted_in_loops():
    def function(x, w):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)

    module = compiled(function, ((32, 64), ('fsdp',)), ((64, 64), ()))
    assert costs.flops(module) == 5 * 2 * 8 * 64 * 64


@pytest.mark.parametrize(('rows', 'times'), [('', 1), ('2,', 2)])
def test_flops_of_splash_kernels_are_those_of_the_blocks_that_it_visits(rows, times):
    text = f"""HloModule m
ENTRY %main (m: s8[1,4,4], q: bf16[{rows}8,4096,128]) -> bf16[{rows}8,4096,128] {{
  %m = s8[1,4,4] parameter(0)
  %q = bf16[{rows}8,4096,128] parameter(1)
  ROOT %splash_mha_fwd_residuals.1 = bf16[{rows}8,4096,128] custom-call(%m, %q, %q, %q), custom_call_target="tpu_custom_call"
}}
"""
    assert costs.flops(hlo.parse(text)) == times * 2 * 2 * 8 * 128 * 4096**2 * 10 / 16


@pytest.mark.parametrize(('partial', 'products'), [('', 4), ('bf16[4,8,4096,128], ', 5)])
def test_a_backward_kernel_that_makes_dq_too_does_a_product_more(partial, products):
    text = f"""HloModule m
ENTRY %main (m: s8[1,4,4], q: bf16[8,4096,128]) -> bf16[8,4096,128] {{
  %m = s8[1,4,4] parameter(0)
  %q = bf16[8,4096,128] parameter(1)
  ROOT %splash_mha_dkv_segmented.1 = ({partial}bf16[8,4096,128]) custom-call(%m, %q, %q), custom_call_target="tpu_custom_call"
}}
"""
    assert costs.flops(hlo.parse(text)) == products * 2 * 8 * 128 * 4096**2 * 10 / 16


def test_slices_of_a_large_array_are_read_and_written_as_slices():
    def function(x):
        return jax.lax.scan(lambda carry, row: (carry, jnp.sin(row)), 0.0, x)[1]

    module = compiled(function, ((100, 4096), ()))
    moved = costs.hbm_bytes(module)
    assert 2 * 100 * 4096 * 4 <= moved <= 8 * 100 * 4096 * 4


def test_large_buffers_are_found_by_their_sizes():
    def function(x, w):
        return jax.nn.softmax(x @ w).sum()

    module = compiled(function, ((24, 16), ()), ((16, 640), ()))
    assert hlo.buffers(module)[0][0].bytes == 24 * 640 * 4
    assert [array.dims for array in hlo.spanning(module, {24}, {640})] == [(24, 640)]
    assert not hlo.spanning(module, {24}, {24})


def test_donated_arguments_are_aliased():
    for donate, count in ((0, 1), ((), 0)):
        assert hlo.aliased_outputs(compiled(lambda x: x + 1, ((8, 8), ()), donate_argnums=donate)) == count
