"""What a compiled program computes and moves: FLOPs of its matrix products and bytes to and from HBM, loops multiplied.

XLA's own cost analysis counts the body of a loop once and a Pallas kernel not at all.
"""

import math
import re

from qedjax.plan.hlo import Array, Instruction, Module, runs

# Matrix products that a splash kernel does for a pair of blocks: scores and output; scores, dP, dQ; scores, dV, dP, dK. One that makes
# all gradients has the third's name, and a dQ for each block of keys among its results.
SPLASH_PRODUCTS = {'splash_mha_fwd': 2, 'splash_mha_dq': 3, 'splash_mha_dkv': 4}
# What moves no bytes by itself: names for parts of other results, control, and the second halves of asynchronous pairs.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all', 'partition-id',
         'replica-id', 'opt-barrier', 'optimization-barrier', 'iota', 'async-start', 'async-done', 'domain'}


def flops(module: Module) -> float:
    """FLOPs of one device in matrix products and splash kernels: 2 for a multiplication with its addition."""
    total = 0.0
    for run in runs(module):
        for instruction in module.computations[run.computation].values():
            operands = [a for operand in module.operands(run.computation, instruction) for a in operand.arrays[:1]]
            total += run.count * _flops(instruction, operands)
    return total


def _flops(instruction: Instruction, operands: list[Array]) -> float:
    if instruction.opcode == 'dot':
        contracting = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
        dims = [int(d) for d in contracting.group(1).split(',') if d] if contracting else []
        return 2 * instruction.arrays[0].size * math.prod(operands[0].dims[d] for d in dims)
    if instruction.opcode == 'convolution':
        return _convolution(instruction, operands)
    if instruction.opcode == 'custom-call' and (name := next((n for n in SPLASH_PRODUCTS if n in instruction.name), None)):
        fused = max(len(array.dims) for array in instruction.arrays) > len(_queries(operands).dims)
        return (SPLASH_PRODUCTS[name] + fused) * _causal_product(operands)
    return 0.0


def _convolution(instruction: Instruction, operands: list[Array]) -> float:
    """TPUs write matrix products as convolutions, a dimension of heads or layers as a window; each of its positions meets one other."""
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
    if not labels:
        return 0.0
    parts = [dict(zip(text, array.dims, strict=True)) for text, array in
             zip(labels.groups(), (*operands[:2], instruction.arrays[0]), strict=True)]
    lhs, rhs, out = parts
    spatial = math.prod(max(part[d] for part in parts) for d in lhs if d.isdigit())
    return 2.0 * lhs['b'] * rhs['i'] * rhs['o'] * spatial if out else 0.0


def _queries(operands: list[Array]) -> Array:
    """The first of a splash kernel's operands that is no table."""
    return next(array for array in operands if len(array.dims) >= 3 and array.dtype in ('bf16', 'f32'))


def _causal_product(operands: list[Array]) -> float:
    """One product [T, H] x [H, T] of every head over the blocks at or below the diagonal; q [N, T, H], or [B, N, T, H], comes first."""
    *heads, length, width = _queries(operands).dims
    blocks = next((array.dims[-1] for array in operands if array.dtype == 's8'), 1)  # the mask has an entry for each block
    return 2.0 * math.prod(heads) * width * length**2 * (blocks + 1) / (2 * blocks)


def hbm_bytes(module: Module) -> float:
    """Bytes that one device reads from and writes to HBM. Slices of larger arrays count as slices; on-chip buffers do not count."""
    total = 0.0
    for run in runs(module):
        if not run.fused:
            for instruction in module.computations[run.computation].values():
                total += run.count * _moved(module, run.computation, instruction)
    return total


def _moved(module: Module, computation: str, instruction: Instruction) -> int:
    if instruction.opcode in _FREE or instruction.opcode.endswith('-done'):
        return 0
    operands = module.operands(computation, instruction)
    if instruction.opcode in ('copy-start', 'slice-start'):  # results: target, source, token
        target, source = instruction.arrays[0], operands[0].arrays[0]
        return target.bytes * (target.hbm + source.hbm)
    if instruction.opcode in ('dynamic-slice', 'slice', 'gather'):
        return 2 * _hbm(instruction.arrays)
    if instruction.opcode == 'dynamic-update-slice':
        return 2 * _hbm(operands[1].arrays)
    if instruction.opcode == 'fusion' and instruction.called('calls'):
        return _fusion(module, instruction, operands)
    return _hbm(instruction.arrays) + sum(_hbm(operand.arrays) for operand in operands)


def _hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.hbm)


def _fusion(module: Module, fusion: Instruction, operands: list[Instruction]) -> int:
    """What its parameters are read for and what its results write; buffers that only pass through on their way count nothing."""
    body = module.computations[fusion.called('calls')[0]]
    passing = re.search(r'output_to_operand_aliasing=\{(.*?\})\}[,\s]', fusion.attributes + ' ')
    pairs = re.findall(r'\{(\d*)\}: \((\d+),', passing.group(1)) if passing else []
    asynchronous = 'async_collective' in fusion.attributes
    outs, ins = ({int(pair[i] or 0) for pair in pairs} if asynchronous else set() for i in (0, 1))
    parameters = {int(i.arguments): i for i in body.values() if i.opcode == 'parameter'}
    total = 0
    for number, operand in enumerate(operands):
        if number not in ins and operand.arrays and operand.arrays[0].hbm:
            total += _read(body, parameters[number])
    root = next(i for i in body.values() if i.root)
    results = [body[name] for name in root.operands] if root.opcode == 'tuple' else [root]
    for number, (result, array) in enumerate(zip(results, fusion.arrays, strict=False)):
        if number not in outs and array.hbm:
            total += _written(body, result, array)
    return total


def _read(body: dict[str, Instruction], parameter: Instruction) -> int:
    """Bytes of a fusion's parameter that are read: all, or the slices that are taken of it; none where it is only written into."""
    users = _users(body, parameter.name)
    total = 0
    for user in users:
        if user.opcode in ('dynamic-slice', 'slice'):
            total += user.bytes
        elif user.opcode != 'dynamic-update-slice' or user.operands[0] != parameter.name:
            return parameter.bytes
    return min(total, parameter.bytes)


def _users(body: dict[str, Instruction], name: str) -> list[Instruction]:
    direct = [i for i in body.values() if name in i.operands]
    return [user for i in direct for user in (_users(body, i.name) if i.opcode == 'bitcast' and not i.root else [i])]


def _written(body: dict[str, Instruction], result: Instruction, array: Array) -> int:
    while result.opcode == 'bitcast' and result.operands:
        result = body[result.operands[0]]
    return body[result.operands[1]].bytes if result.opcode == 'dynamic-update-slice' else array.bytes
