"""Eight fake CPU devices for every test; the mesh of one device unless a test sets its own."""

import os
import pathlib

# Compiling dominates these tests: unoptimised code is exact enough to test and compiles twice as fast.
FLAGS = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
os.environ['XLA_FLAGS'] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# Programs that several tests, workers and processes build are compiled once: each run of a launcher in a test would start from nothing.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import jax
import pytest

from qedjax.sharding import MeshConfig, make_mesh


@pytest.fixture
def mesh():
    """A training mesh of one device, in force during the test."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh
