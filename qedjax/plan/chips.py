"""Accelerators as their makers describe them: memory, bandwidths and peak FLOPs, and the slices that they come in.

TPUs: the system architecture pages of cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x). GPUs: NVIDIA's data sheets of the SXM modules.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from qedjax.metrics import peak_flops

GIB = 2**30
SMEM = 2**20  # bytes of scalar memory of a TPU core, as libtpu says of v5e, v5p and v6e


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of an accelerator.

    Attributes:
      name: as in a topology, e.g. 'v5p'.
      kind: what JAX calls the device.
      hbm: bytes of memory.
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second that a device can send over all its ICI links or NVLinks together, one way.
      host: devices of one host in a slice of several.
      torus: dimensions of the ICI torus; 0 is a switch (NVLink).
      devices: JAX devices a chip; figures above are of one device.
      aot: name by which libtpu compiles for it; '' if it cannot (v4 it describes by core, not by chip).
    """

    name: str
    kind: str
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    host: int
    torus: int
    devices: int = 1
    aot: str = ''

    @property
    def flops(self) -> float:
        """Dense bf16 peak a second."""
        peak = peak_flops(self.kind)
        assert peak, f'metrics.py has no peak for {self.kind}'
        return peak


CHIPS = {chip.name: chip for chip in (
    Chip('v4', 'TPU v4', 32 * GIB, 1200e9, 300e9, 4, 3),
    Chip('v5e', 'TPU v5 lite', 16 * GIB, 819e9, 200e9, 4, 2, aot='v5e'),
    Chip('v5p', 'TPU v5', 95 * GIB, 2765e9, 600e9, 4, 3, aot='v5p'),
    Chip('v6e', 'TPU v6 lite', 32 * GIB, 1638e9, 400e9, 4, 2, aot='v6e'),
    Chip('v7x', 'TPU7x', 96 * GIB, 3690e9, 300e9, 8, 3, 2, 'tpu7x'),
    Chip('a100', 'A100', 80 * GIB, 2039e9, 300e9, 8, 0),
    Chip('h100', 'H100', 80 * GIB, 3350e9, 450e9, 8, 0),
    Chip('h200', 'H200', 141 * GIB, 4800e9, 450e9, 8, 0),
)}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Accelerators of one kind in a torus (its sides) or behind switches (their number)."""

    chip: Chip
    sides: tuple[int, ...]

    @property
    def devices(self) -> int:
        """JAX devices of the slice."""
        return math.prod(self.sides) * self.chip.devices

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def hosts(self) -> int:
        if self.chip.torus == 2 and sorted(self.sides) == [2, 4]:
            return 1  # the one host of eight chips
        return max(self.devices // self.chip.host, 1)

    @property
    def name(self) -> str:
        return f'{self.chip.name}:{"x".join(map(str, self.sides))}'

    @property
    def host(self) -> 'Slice':
        """The devices of one host, which one process drives."""
        return self if self.hosts == 1 else Slice(self.chip, {0: (self.chip.host,), 2: (2, 2), 3: (2, 2, 1)}[self.chip.torus])

    @property
    def aot(self) -> str:
        """Name of the topology for libtpu."""
        return f'{self.chip.aot}:{"x".join(map(str, self.sides))}'

    def share(self, group: int) -> float:
        """Part of a device's links that a collective among `group` devices can use: those along the sides that the group fills."""
        if not self.chip.torus:
            return 1.0
        side = max(max(self.sides), 2)
        return min(max(math.ceil(math.log(group, side) - 1e-9), 1), self.chip.torus) / self.chip.torus

    def holds(self, sizes: Sequence[int]) -> bool:
        """Whether jax.make_mesh lays axes of these sizes on the torus: each takes whole sides, the last first and as many as it can."""
        if not self.chip.torus or self.devices <= 8:  # of so few, JAX makes rings, which any axes may cut
            return True
        sides = [*self.sides, self.chip.devices]
        for size in reversed(sizes):
            taken = next((some for count in range(len(sides), 0, -1) for some in itertools.combinations(range(len(sides)), count)
                          if math.prod(sides[i] for i in some) == size), ())
            if size > 1 and not taken:
                return False
            sides = [side for i, side in enumerate(sides) if i not in taken]
        return True


def parse_topology(text: str) -> Slice:
    """'v5p:4x4x4' or 'h100:8'. Raises ValueError, in one sentence, for what is neither."""
    name, _, sizes = text.partition(':')
    if name.lower() not in CHIPS:
        raise ValueError(f'topology {text!r} is of no chip known here; choose one of {", ".join(CHIPS)}, as in v5p:4x4x4 or h100:8')
    chip = CHIPS[name.lower()]
    if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', sizes):
        raise ValueError(f'topology {text!r} has no size; write it as {chip.name}:{"x".join("4" * chip.torus) or 8}')
    sides = tuple(map(int, sizes.split('x')))
    if len(sides) != max(chip.torus, 1):
        raise ValueError(f'topology {text!r} has {len(sides)} sides, but {chip.name} has {max(chip.torus, 1)}, as in '
                         f'{chip.name}:{"x".join("4" * chip.torus) or 8}')
    return Slice(chip, sides)
