"""Reads the text of an optimised HLO module: computations, instructions, shapes, and how often each computation runs.

`jax.stages.Compiled.as_text()` is the program as a device will run it, after partitioning: shapes are those of one device. A loop's body
stands there once; its trip count is told by XLA (`known_trip_count`) or read from the comparison in its condition. Everything here is a
pure function of that text.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8,
         'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}
_ARRAY = re.compile(r'\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?')
_NAME = re.compile(r'%([\w.-]+)')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%([\w.-]+) = (.*)$')
_OPCODE = re.compile(r'\s*([a-z][\w-]*)\(')
_COMMENT = re.compile(r'/\*.*?\*/')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of one device; `hbm` is False where the compiler put it into on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    hbm: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of tiled layouts."""
        return math.ceil(self.size * BYTES.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `attributes` is the text after the operands."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    arguments: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def called(self, attribute: str) -> list[str]:
        """Computations named in an attribute, as calls=%f or branch_computations={%f, %g}."""
        match = re.search(rf'\b{attribute}=(\{{[^}}]*\}}|%[\w.-]+)', self.attributes)
        return _NAME.findall(match.group(1)) if match else []


@dataclasses.dataclass(frozen=True)
class Module:
    """A module: instructions by name for each computation, and the name of the one that runs."""

    header: str
    computations: dict[str, dict[str, Instruction]]
    entry: str

    def operands(self, computation: str, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results this one takes."""
        known = self.computations[computation]
        return [known[name] for name in instruction.operands if name in known]

    def root(self, computation: str) -> Instruction:
        """The instruction whose result a computation returns."""
        return next(i for i in self.computations[computation].values() if i.root)


def parse(text: str) -> Module:
    """Reads a module. Raises ValueError for a text that is none."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, header = '', None, text.split('\n', 1)[0]
    for line in text.splitlines():
        if current is None:
            if match := _HEADER.match(line):
                current = computations[match.group(2)] = {}
                entry = match.group(2) if match.group(1) else entry
        elif line == '}' or line.startswith('}, execution_thread='):  # some attributes go over several lines, and begin with '}' too
            current = None
        elif match := _LINE.match(line):
            current[match.group(2)] = _instruction(match.group(2), _COMMENT.sub('', match.group(3)), bool(match.group(1)))
    if not header.startswith('HloModule') or not entry:
        raise ValueError('this is not the text of an HLO module with an ENTRY computation')
    return Module(header, computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
    match = _OPCODE.match(text, end)
    if not match:
        raise ValueError(f'the HLO instruction {name} cannot be read: {text[:80]!r}')
    close = _closing(text, match.end() - 1)
    arguments = text[match.end():close]
    operands = tuple(_NAME.findall(arguments))
    return Instruction(name, match.group(1), tuple(arrays_of(text[:end])), operands, text[close + 1:], arguments, root)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r'[()]').finditer(text, start):
        depth += 1 if match.group() == '(' else -1
        if not depth:
            return match.start()
    raise ValueError(f'a parenthesis is not closed: {text[:80]!r}')


def arrays_of(shape: str) -> Iterator[Array]:
    """The arrays of a shape, those of tuples one after the other."""
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype in BYTES:
            space = re.search(r'S\((\d+)\)', layout)
            yield Array(dtype, tuple(int(d) for d in dims.split(',') if d), not space or space.group(1) == '0')


@dataclasses.dataclass(frozen=True)
class Run:
    """A computation as it runs: how often, whether inside a fusion, and in which computation that fusion stands."""

    computation: str
    count: int
    fused: bool
    owner: str


def runs(module: Module) -> list[Run]:
    """Every computation with how often the module runs it: trip counts of loops multiplied, each branch of a conditional counted.

    A loop whose trip count depends on data counts once; uncounted_loops tells which.
    """
    found: list[Run] = []

    def visit(name: str, count: int, fused: bool, owner: str) -> None:
        found.append(Run(name, count, fused, owner))
        for instruction in module.computations[name].values():
            if instruction.opcode == 'fusion':
                for called in instruction.called('calls'):
                    visit(called, count, True, owner)
            elif instruction.opcode == 'while':
                for called in instruction.called('body'):
                    visit(called, count * (trip_count(module, instruction) or 1), fused, called)
            elif instruction.opcode in ('call', 'async-start', 'conditional'):
                names = [n for a in ('to_apply', 'calls', 'branch_computations', 'true_computation', 'false_computation')
                         for n in instruction.called(a)]
                for called in names:
                    visit(called, count, fused, called)

    visit(module.entry, 1, False, module.entry)
    return found


def uncounted_loops(module: Module) -> list[str]:
    """Names of the loops that run as often as the data say."""
    return [i.name for run in runs(module) for i in module.computations[run.computation].values()
            if i.opcode == 'while' and trip_count(module, i) is None]


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Iterations of a while loop that counts up from 0 by 1; of one that may also stop earlier, the most; None if data tell."""
    if match := _TRIPS.search(loop.attributes):
        return int(match.group(1))
    bounds = _bounds(module, loop.called('condition')[0])
    return bounds.pop() if len(bounds) == 1 else None


def _bounds(module: Module, computation: str) -> set[int]:
    """Constants that something must stay below (or at most reach) in a condition and in what it calls."""
    constants = {}
    for instruction in module.computations[computation].values():
        if instruction.opcode == 'constant' and re.fullmatch(r'\d+', instruction.arguments):
            constants[instruction.name] = int(instruction.arguments)
    found = set()
    for instruction in module.computations[computation].values():
        direction = re.search(r'direction=(LT|LE)', instruction.attributes)
        limits = [constants[name] for name in instruction.operands if name in constants]
        if instruction.opcode == 'compare' and direction:
            found |= {limit + (direction.group(1) == 'LE') for limit in limits}
        for called in instruction.called('calls') + (instruction.called('to_apply') if instruction.opcode == 'call' else []):
            inside = _bounds(module, called)
            found |= inside or (set(limits) if _compares(module, called) else set())
    return found


def _compares(module: Module, computation: str) -> bool:
    root = module.root(computation)
    return root.opcode == 'compare' and 'direction=LT' in root.attributes


def buffers(module: Module) -> list[tuple[Array, Instruction]]:
    """Every array that the module holds in memory (not those inside fusions), largest first, one for each shape."""
    largest: dict[tuple[str, tuple[int, ...]], tuple[Array, Instruction]] = {}
    for run in runs(module):
        if not run.fused:
            for instruction in module.computations[run.computation].values():
                for array in instruction.arrays:
                    largest.setdefault((array.dtype, array.dims), (array, instruction))
    return sorted(largest.values(), key=lambda pair: -pair[0].bytes)


def spanning(module: Module, one: set[int], other: set[int]) -> list[Array]:
    """Buffers with one dimension of a size in `one` and another dimension of a size in `other`."""
    def spans(dims: tuple[int, ...]) -> bool:
        return any(a in one and b in other for i, a in enumerate(dims) for j, b in enumerate(dims) if i != j)

    return [array for array, _ in buffers(module) if spans(array.dims)]


def aliased_outputs(module: Module) -> int:
    """Number of results that are written over an argument's buffer (donated)."""
    start = module.header.find('input_output_alias=')
    return 0 if start < 0 else len(re.findall(r'\{[\d, ]*\}: \(\d+,', module.header[start:]))
