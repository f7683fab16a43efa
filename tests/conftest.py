"""Eight fake CPU devices for every test; the mesh of one device unless a test sets its own."""

import os

# Compiling dominates these tests: unoptimised code is exact enough to test and compiles twice as fast.
FLAGS = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
os.environ['XLA_FLAGS'] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import jax
import pytest

from qedjax.sharding import MeshConfig, make_mesh


@pytest.fixture
def mesh():
    """A training mesh of one device, in force during the test."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh
