"""Paged attention on TPUs: the kernel's reference equals the xla backend, and the 4B model's engine compiles for real chips.

The kernel itself does not run in interpret mode in jax 0.10: it reshapes a reference, which the interpreter cannot read.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from qedjax.model import attention_paged, attention_ragged
from qedjax.model.presets import qwen3_4b
from qedjax.rollout.engine_config import EngineConfig
from tools import aot_rollout


@pytest.mark.parametrize(('starts', 'lengths'), [((0, 37, 5, 15), (1, 1, 1, 1)), ((0, 16, 3), (16, 16, 7))])
def test_the_reference_of_the_kernel_equals_xla(monkeypatch, starts, lengths):
    """Decoding, and a prefill whose last row is short; pages are out of order. What the kernel is given passes its own checks."""
    def reference(*args, sm_scale, **blocks):
        kernel.dynamic_validate_inputs(*args, sm_scale=sm_scale, **blocks)
        return kernel.ref_ragged_paged_attention(*args, sm_scale=sm_scale)

    monkeypatch.setattr(attention_ragged, 'ragged_paged_attention', reference)
    rng, T, C, K, N, H = np.random.default_rng(0), max(lengths), 16, 2, 4, 128
    B, n, P = len(starts), 4, 20
    positions = np.full((B, T), -1, np.int32)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        positions[row, :length] = start + np.arange(length)
    table = rng.permutation(P)[: B * n].reshape(B, n).astype(np.int32)
    table, positions = jnp.asarray(table), jnp.asarray(positions)
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    contents = jnp.asarray(rng.normal(size=(2, P, C, K, H)), jnp.float32)
    pages = {}
    for backend, cache in ((attention_paged, jnp.zeros((P, 2, K, C, H))), (attention_ragged, jnp.zeros((P, C, 2 * K, H)))):
        everywhere = jnp.broadcast_to(jnp.arange(P)[:, None], (P, C)), jnp.broadcast_to(jnp.arange(C), (P, C))
        pages[backend] = backend.write(*contents, cache, *everywhere)
        assert backend.page_size(pages[backend]) == C
        assert pages[backend].shape[1:] == backend.page_shape(C, K, H)
    got = attention_ragged.attend(q, pages[attention_ragged], table, positions, None)
    want = attention_paged.attend(q, pages[attention_paged], table, positions, attention_paged.plan(table, positions, C))
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.tpu_aot
@pytest.mark.parametrize('topology', ['v5p:2x2x1', 'v6e:2x2'])
def test_the_engine_of_the_4b_model_compiles_with_its_cache_in_place(topology):
    pytest.importorskip('libtpu', reason='needs the libtpu wheel')
    cfg = dataclasses.replace(qwen3_4b(), param_dtype='bfloat16', paged_attention='ragged', remat='none')
    config = EngineConfig(slots=64, staged=64, max_length=40_960, cache_tokens=2**18)
    mesh = aot_rollout.topology_mesh(topology, 4)
    programs = aot_rollout.compile_engine(mesh, cfg, config, 151_669)
    assert len(programs) == 3
    for compiled in programs.values():
        assert 'tpu_custom_call' in compiled.as_text()
        assert 'written in place' in aot_rollout.describe(compiled, aot_rollout.cache_bytes(cfg, config, 1, 4))
        assert compiled.memory_analysis().temp_size_in_bytes < 2**30
