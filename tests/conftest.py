"""Eight fake CPU devices for every test; the mesh of one device unless a test sets its own."""

import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
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
