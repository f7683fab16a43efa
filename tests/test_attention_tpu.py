"""Splash attention inside a real layer, compiled ahead of time for TPU topologies by the libtpu wheel; no TPU is needed."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from qedjax.model.attention import attend_packed
from qedjax.model.presets import qwen3_4b
from qedjax.model.rope import rope_angles
from qedjax.model.transformer import Block, rematerialize
from qedjax.plan.programs import build, topology_devices
from qedjax.sharding import MeshConfig, abstract, make_mesh, spec

pytestmark = pytest.mark.tpu_aot

KERNEL = 'custom_call_target="tpu_custom_call"'


def topology_mesh(name, mesh_config):
    pytest.importorskip('libtpu', reason='needs the libtpu wheel')
    return make_mesh(mesh_config, topology_devices(name))


def compile_layer(mesh, length, **changes):
    """Forward and backward of one layer of Qwen3-4B's shape on rows of `length`, compiled for the mesh's devices."""
    cfg = dataclasses.replace(qwen3_4b(), attention='splash', **changes)
    block = abstract(lambda: Block(cfg, jax.random.key(0)), mesh)

    def loss(block, x, positions, segments):
        def layer(x, block):
            return block(x, rope_angles(cfg, positions), lambda q, k, v: (attend_packed(q, k, v, segments, cfg), None))[0]

        return rematerialize(layer, cfg.remat)(x, block).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        rows = mesh.shape['fsdp']
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=NamedSharding(mesh, spec('batch', 'sequence')))
        x = jax.ShapeDtypeStruct((rows, length, cfg.embed_dim), jnp.dtype(cfg.dtype),
                                 sharding=NamedSharding(mesh, spec('batch', 'sequence', None)))
        return build('the layer', jax.jit(jax.value_and_grad(loss)).lower(block, x, ids, ids))


def test_long_rows_fit_v5e():
    """Rows of 49,152 positions: no buffer is T x T, and remat='attention' runs two kernels: forward and backward."""
    mesh = topology_mesh('v5e:2x4', MeshConfig(fsdp=1, tensor=2, context=4))
    compiled = compile_layer(mesh, 49_152, remat='attention')
    assert compiled.as_text().count(KERNEL) == 2
    assert '49152,49152' not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**30


def test_small_float32_heads_and_odd_lengths_compile_for_v5p():
    """remat='full' runs the forward kernel twice."""
    mesh = topology_mesh('v5p:2x2x2', MeshConfig())
    compiled = compile_layer(mesh, 640, embed_dim=256, mlp_dim=512, num_heads=4, num_kv_heads=2, head_dim=64, dtype='float32',
                             remat='full')
    assert compiled.as_text().count(KERNEL) == 3
