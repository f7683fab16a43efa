"""TPU slices by generation and shape: how many chips and hosts they have, and what TPU VMs and GKE call them.

Sources: Google's pages on the generations, on TPU software versions and on TPUs in GKE.
"""

import dataclasses
import math

_PLANE = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_TORUS = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16')
# generation: shapes, prefix and units a chip of the accelerator type, software of TPU VMs, GKE's label
_GENERATIONS = {
    'v4': (_TORUS, 'v4', 2, 'tpu-ubuntu2204-base', 'tpu-v4-podslice'),
    'v5e': (_PLANE, 'v5litepod', 1, 'v2-alpha-tpuv5-lite', 'tpu-v5-lite-podslice'),
    'v5p': (_TORUS, 'v5p', 2, 'v2-alpha-tpuv5', 'tpu-v5p-slice'),
    'v6e': (_PLANE, 'v6e', 1, 'v2-alpha-tpuv6e', 'tpu-v6e-slice'),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One TPU slice.

    Attributes:
      shape: of its chips, e.g. '4x4x4'.
      chips, hosts: how many.
      accelerator_type: in `gcloud compute tpus`, e.g. 'v5p-128' (v4 and v5p count cores, two a chip).
      runtime: software version of its TPU VMs.
      gke_accelerator: in GKE's node label.
    """

    shape: str
    chips: int
    hosts: int
    accelerator_type: str
    runtime: str
    gke_accelerator: str


def parse(topology: str) -> Slice:
    """The slice of 'v5p:4x4x4'. Raises ValueError for one that does not exist."""
    generation, _, shape = topology.partition(':')
    if generation not in _GENERATIONS:
        raise ValueError(f'--topology={topology} must read GENERATION:SHAPE, e.g. v5p:4x4x4; generations are {", ".join(_GENERATIONS)}')
    shapes, prefix, units, runtime, label = _GENERATIONS[generation]
    if shape not in shapes:
        raise ValueError(f'--topology={topology} is no slice of {generation}; its shapes are {", ".join(shapes)}')
    chips = math.prod(map(int, shape.split('x')))
    single = chips <= 4 or shape == '2x4'  # 2x4 is the one host of eight chips
    return Slice(shape, chips, 1 if single else chips // 4, f'{prefix}-{chips * units}', runtime, label)
