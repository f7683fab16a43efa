"""What a compiled program sends between devices: every collective with its bytes and how often it runs."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable

from qedjax.plan.hlo import Instruction, Module, runs

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CHANNEL = re.compile(r'channel_id=(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      bytes: of the whole array that a device ends with (all-gather) or starts with (all others).
      group: devices that take part together.
      count: runs in one call of the program.
      shape: of its first operand.
      hidden: whether the compiler runs it beside other work.
      source: where the model asked for it, as JAX's name stack tells.
    """

    kind: str
    bytes: int
    group: int
    count: int
    shape: tuple[int, ...]
    hidden: bool
    source: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all runs, by the best known algorithm on a ring: an all-reduce scatters and then gathers."""
        if self.kind == 'collective-permute':
            return self.bytes * self.count
        return self.bytes * self.count * (self.group - 1) / self.group * (2 if self.kind == 'all-reduce' else 1)


def collectives(module: Module) -> list[Collective]:
    """Every collective of a module, loops multiplied.

    TPUs hide a collective behind products by running it in parts inside their fusions. All parts bear one chain_id; they count once.
    Their all-reduce of which each device keeps a slice, fused with the slicing, is a reduce-scatter.
    """
    found, chains = [], set()
    for run in runs(module):
        for instruction in module.computations[run.computation].values():
            kind = instruction.opcode.removesuffix('-start')
            if kind not in KINDS:
                continue
            chain = _CHAIN.search(instruction.attributes)
            key = (run.owner, chain and chain.group(1), _number(_CHANNEL, instruction.attributes), kind)
            if chain and key in chains:
                continue
            chains.add(key)
            if kind == 'all-reduce' and run.fused and _sliced(module, run.computation, instruction):
                kind = 'reduce-scatter'
            hidden = bool(chain) or instruction.opcode.endswith('-start')
            found.append(_collective(module, run.computation, instruction, kind, run.count, hidden))
    return found


def _collective(module: Module, computation: str, instruction: Instruction, kind: str, count: int, hidden: bool) -> Collective:
    operands = module.operands(computation, instruction)
    group = group_size(instruction.attributes)
    size = sum(operand.bytes for operand in operands) * (group if kind == 'all-gather' else 1)
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(kind, size, group, count, operands[0].arrays[0].dims if operands else (), hidden,
                      source.group(1) if source else '')


def _sliced(module: Module, computation: str, instruction: Instruction) -> bool:
    root = module.root(computation)
    return root.opcode == 'dynamic-slice' and root.operands[0] == instruction.name


def group_size(attributes: str) -> int:
    """Devices of a group: replica_groups as {{0,2},{1,3}}, as [2,2]<=[4] or as mesh['a'=2,'b'=2] {'a'}; pairs of a permutation are 2."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match.group(1))}
        parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match.group(2))
        return math.prod(int(part) if part else sizes[name] for name, _, part in parts)
    if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
        return int(match.group(2))
    if match := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
        return match.group(1).count(',') + 1
    if 'source_target_pairs' in attributes:
        return 2
    raise ValueError(f'the devices of a collective cannot be read: {attributes[:120]!r}')


def _number(pattern: re.Pattern, text: str) -> int | None:
    match = pattern.search(text)
    return int(match.group(1)) if match else None


def sent_by_kind(found: Iterable[Collective]) -> dict[str, float]:
    """Bytes that a device sends, by kind, largest first."""
    totals: dict[str, float] = defaultdict(float)
    for collective in found:
        totals[collective.kind] += collective.sent
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
