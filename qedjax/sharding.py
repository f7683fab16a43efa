"""Device meshes and the tables that map logical axis names to mesh axes.

Model code names what a dimension is ('batch', 'heads', ...); the role's table says where it lives. The role is read from the mesh in
force (`jax.set_mesh`): meshes are part of every jit cache key, so a function traced for training is never reused for rollout.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

TRAIN_AXES = ('data', 'fsdp', 'context', 'tensor')
ROLLOUT_AXES = ('data', 'tensor')

# logical axis -> mesh axes. Residuals are sequence-sharded over `context`; attention is heads-sharded over (tensor, context).
TRAIN_TABLE: dict[str, str | tuple[str, ...]] = {
    'batch': ('data', 'fsdp'),
    'sequence': 'context',
    'embed': 'fsdp',
    'vocab': 'tensor',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'attention_heads': ('tensor', 'context'),
}
# Rollout keeps whole layers on each data replica: decoding would otherwise gather every weight for every token.
ROLLOUT_TABLE: dict[str, str | tuple[str, ...]] = {
    'batch': 'data',
    'vocab': 'tensor',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'attention_heads': 'tensor',
}
TABLES: dict[tuple[str, ...], dict[str, str | tuple[str, ...]]] = {TRAIN_AXES: TRAIN_TABLE, ROLLOUT_AXES: ROLLOUT_TABLE}


@dataclasses.dataclass(unsafe_hash=True)
class MeshConfig:
    """Sizes of the training mesh axes; at most one may be -1 (all remaining devices).

    Attributes:
      data: replicas (parameters are copied, gradients summed).
      fsdp: batch and parameters are both sharded.
      context: positions of a row are sharded, for rows that do not fit one device.
      tensor: heads, mlp and vocabulary are sharded.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Training mesh over `devices` (all by default), Explicit in every axis. Raises ValueError if the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    return _explicit_mesh(mesh_sizes(cfg, len(devices)), TRAIN_AXES, devices)


def mesh_sizes(cfg: MeshConfig, count: int) -> list[int]:
    """Sizes of TRAIN_AXES over `count` devices. Raises ValueError if they do not fit."""
    sizes = [getattr(cfg, axis) for axis in TRAIN_AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f'mesh sizes must be positive, with at most one -1: {cfg}')
    known = math.prod(size for size in sizes if size != -1)
    if count % known or (-1 not in sizes and known != count):
        needed = f'a multiple of {known}' if -1 in sizes else known
        raise ValueError(f'mesh {dict(zip(TRAIN_AXES, sizes, strict=True))} needs {needed} devices, but there are '
                         f'{count}; change its sizes so that their product is {count}')
    return [count // known if size == -1 else size for size in sizes]


def make_rollout_mesh(data: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Rollout mesh over the first data * tensor of `devices`: slots over `data`, heads over `tensor`."""
    devices = jax.devices() if devices is None else devices
    if data * tensor > len(devices):
        raise ValueError(f'rollout mesh {data}x{tensor} needs {data * tensor} devices, but there are {len(devices)}')
    return _explicit_mesh((data, tensor), ROLLOUT_AXES, devices[: data * tensor])


def rollout_mesh_of_all(tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Rollout mesh over `devices`, all of this process by default, `tensor` of them sharing the heads."""
    devices = jax.local_devices() if devices is None else devices
    if tensor < 1 or len(devices) % tensor:
        raise ValueError(f'tensor={tensor} must divide the {len(devices)} devices of this process')
    return make_rollout_mesh(len(devices) // tensor, tensor, devices)


def check_rows(mesh: Mesh | AbstractMesh, rows: int, length: int, name: str) -> None:
    """Raises ValueError if `name` rows of `length` positions do not share evenly over a training mesh."""
    shards, context = mesh.shape['data'] * mesh.shape['fsdp'], mesh.shape['context']
    if rows % shards or length % context:
        raise ValueError(f'{name}={rows} rows of row_length={length} cannot be shared evenly by data x fsdp = {shards} devices with '
                         f'context = {context}; change them or mesh')


def without_context(mesh: Mesh) -> Mesh:
    """The same devices with the context axis folded into fsdp: for decoding, whose rows have one position at a time."""
    data, fsdp, context, tensor = (mesh.shape[axis] for axis in TRAIN_AXES)
    devices = mesh.devices.reshape(data, fsdp * context, 1, tensor)
    return Mesh(devices, TRAIN_AXES, axis_types=(AxisType.Explicit,) * len(TRAIN_AXES))


def _explicit_mesh(sizes: Sequence[int], axes: Sequence[str], devices: Sequence[jax.Device]) -> Mesh:
    try:
        return jax.make_mesh(tuple(sizes), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes), devices=devices)
    except NotImplementedError as error:  # so JAX says of TPUs alone, whose devices form a torus
        raise off_torus(dict(zip(axes, sizes, strict=True))) from error


def off_torus(sizes: dict[str, int]) -> ValueError:
    """The error of a mesh that a TPU slice cannot hold."""
    return ValueError(f'mesh {sizes} cannot be laid on this TPU slice: the size of each axis must be the product of some of its sides, as '
                      '16 x 4 is of 4x4x4 and 8 x 8 of 8x8')


def spec(*names: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names, under the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError('no mesh is set: wrap the call in `with jax.set_mesh(make_mesh(MeshConfig())):`')
    table = TABLES[mesh.axis_names]
    return PartitionSpec(*[table.get(name) if name else None for name in names])


def axis_size(name: str) -> int:
    """Number of shards of a logical axis under the mesh in force."""
    mesh, axes = jax.sharding.get_abstract_mesh(), spec(name)[0]
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def abstract(make, mesh: Mesh):
    """Shapes, dtypes and concrete NamedShardings of what `make()` returns under `mesh`: the target of a restore; nothing is computed."""
    with jax.set_mesh(mesh):
        tree = jax.eval_shape(make)

    def concrete(leaf):
        partition = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition))

    return jax.tree.map(concrete, tree)


def create(make, mesh: Mesh):
    """`make()` compiled under `mesh`: every array is made in the sharding that `abstract` tells, never gathered on one device."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(make, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=shardings)()


def move(tree, mesh: Mesh):
    """The same arrays under another mesh of the same devices, in the shardings that their logical axes have there."""
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, leaf.sharding.spec), tree)
    return jax.device_put(tree, shardings)


def localise(leaf: jax.Array, sharding: NamedSharding, donate: bool = False) -> jax.Array:
    """A copy of an array in a sharding of this process's rollout mesh; if it lies on all processes, each gets it whole, and all must call.

    It comes by the interconnect, in the rollout layout from the start: no device holds more of it than it keeps.
    """
    if leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding, may_alias=False, donate=donate)
    everywhere = jax.device_put(leaf, NamedSharding(_of_every_process(sharding.mesh), sharding.spec))
    mine = {shard.device: shard.data for shard in everywhere.addressable_shards}
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [mine[device] for device in sharding.mesh.devices.flat])


def _of_every_process(mesh: Any) -> Mesh:
    """The rollout meshes of all processes as one, each like this process's, one after the other along `data`."""
    data, tensor = mesh.devices.shape
    owners = sorted({device.process_index for device in jax.devices()})
    meshes = [make_rollout_mesh(data, tensor, [device for device in jax.devices() if device.process_index == owner]) for owner in owners]
    devices = np.concatenate([mesh.devices for mesh in meshes])
    return Mesh(devices, ROLLOUT_AXES, axis_types=(AxisType.Explicit,) * len(ROLLOUT_AXES))


def put(tree, mesh: Mesh, *names: str | None):
    """Places host arrays, the same on every process, as global arrays whose dimensions have these logical names."""
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec(*names))

    def place(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(place, tree)
