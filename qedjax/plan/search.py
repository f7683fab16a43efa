"""Searches meshes, remat policies, micro-batches and, for RL, engine sizes: what fits a slice, and what of it is fastest.

Every candidate is planned from the model's shape, in milliseconds. The fastest are then compiled, one after the other, until one is
confirmed to fit.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax

from qedjax.model.config import REMAT_POLICIES
from qedjax.plan import memory, programs, runs
from qedjax.plan.chips import SMEM, Slice
from qedjax.plan.report import report
from qedjax.plan.runs import ROOM, Plan, plan
from qedjax.rl.config import RLConfig
from qedjax.rollout.engine_config import EngineConfig, table_width
from qedjax.sharding import MeshConfig
from qedjax.train.sft import SFTConfig

Config = SFTConfig | RLConfig

SHOWN = 8  # candidates in the table
TRIES = 4  # compilations before the search gives up
SPARE = 1.5  # room that a cache leaves to the train step, over its estimate: libtpu needed 1.1 to 1.4 times that of the recipe's RL steps
GRAIN = 2**14  # positions to which a cache is rounded down


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config and its plan."""

    cfg: Config
    plan: Plan

    @property
    def flags(self) -> str:
        """What sets this layout on a command line."""
        cfg = self.cfg
        values = {f'mesh.{axis}': size for axis, size in self.plan.sizes.items()} | {'model.remat': cfg.model.remat}
        if isinstance(cfg, SFTConfig):
            values['accumulation'] = cfg.accumulation
        else:
            engine = {f'engine.{name}': getattr(cfg.engine, name) for name in ('slots', 'staged', 'cache_tokens')}
            values |= {'micro_rows': cfg.micro_rows, 'tensor': cfg.tensor} | engine
        return ' '.join(f'--config.{name}={value}' for name, value in values.items())


def tell(cfg: Config, slice: Slice, title: str, *, compile: bool = True, answer: int = 0) -> Iterator[str]:
    """The whole search as text, part by part: the table, what compiling said, and the plan of the best.

    Raises ValueError, in one sentence, if nothing fits.
    """
    ranked = search(cfg, slice, answer=answer)
    yield f'{title} on {slice.name}: {len(ranked)} layouts fit; the fastest, estimated from the model\'s shape:\n\n{table(ranked)}\n'
    best = ranked[0]
    if compile and programs.can_compile(slice):
        for candidate, reason in confirm(ranked, slice, answer):
            if not reason:
                best = candidate
                yield f'confirmed by libtpu: {layout(candidate)}\n'
                break
            yield f'- {layout(candidate)}: {reason}'
        else:
            raise ValueError(f'none of the layouts that were compiled fits {slice.name}; see above for the reasons')
    yield f'the best: {best.flags}\n\n{report(best.plan, title)}'


def search(cfg: Config, slice: Slice, *, answer: int = 0) -> list[Candidate]:
    """Candidates that fit by their estimates, fastest step first; of equal ones the one that is busy the least.

    Raises ValueError, in one sentence, if none fits, or if the run can be laid on this slice in no way at all.
    """
    made, refused = [], None
    for changed in layouts(cfg, slice):
        try:
            sized = [changed] if isinstance(changed, SFTConfig) else engines(changed, slice, answer)
            made += [Candidate(one, plan(one, slice, compile=False, answer=answer)) for one in sized]
        except ValueError as error:
            refused = refused or error
    if not made:
        raise refused or ValueError(f'no mesh of fsdp x context x tensor can be laid on {slice.name}')
    fitting = [candidate for candidate in made if candidate.plan.fits]
    if not fitting:
        least = min(made, key=lambda candidate: candidate.plan.peak)
        raise ValueError(f'nothing fits {slice.name}: of {len(made)} layouts the smallest, {layout(least)}, needs {_memory(least.plan)} a '
                         f'device, and {ROOM:.0%} may be filled; take a larger slice')
    return sorted(fitting, key=lambda one: (float(f'{one.plan.step_seconds:.4g}'), sum(one.plan.step.seconds(slice).values())))


def layouts(cfg: Config, slice: Slice) -> Iterator[Config]:
    """The config on every mesh that the slice holds, with every remat policy and micro-batch; not all of them can be."""
    n = slice.devices
    for context in _divisors(n):
        for tensor in _divisors(n // context):
            mesh = MeshConfig(fsdp=n // context // tensor, context=context, tensor=tensor)
            near = slice.chip.torus or context * tensor <= slice.chip.host  # GPUs of several hosts would exchange heads by slow links
            if near and slice.holds((mesh.fsdp, context, tensor)):
                for remat in REMAT_POLICIES:
                    changed = dataclasses.replace(cfg, mesh=mesh, model=dataclasses.replace(cfg.model, remat=remat))
                    yield from _micro_batches(changed, mesh.fsdp)


def _micro_batches(cfg: Config, shards: int) -> Iterator[Config]:
    if isinstance(cfg, SFTConfig):
        for accumulation in _divisors(cfg.batch_size):
            if cfg.batch_size // accumulation % shards == 0 or accumulation == 1:  # the latter says why none will do
                yield dataclasses.replace(cfg, accumulation=accumulation)
    else:
        answers = cfg.groups * cfg.group_size
        for rows in _divisors(answers):
            if rows % shards == 0 and rows <= 8 * shards:
                yield dataclasses.replace(cfg, micro_rows=rows)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def engines(cfg: RLConfig, slice: Slice, answer: int) -> list[RLConfig]:
    """The config with engines that fit beside its learner: for each way to split heads, the largest cache and the slots to use it.

    A cache that does not hold the longest answer is left as small as it is, and its plan will tell what is too large.
    """
    sized = []
    for tensor in _divisors(math.gcd(slice.host.devices, cfg.model.num_kv_heads)):
        shards = slice.host.devices // tensor
        small = EngineConfig(**{**dataclasses.asdict(cfg.engine), 'slots': shards, 'staged': shards, 'cache_tokens': cfg.engine.page_size})
        smallest = dataclasses.replace(cfg, tensor=tensor, engine=small)
        probe = plan(smallest, slice, compile=False, answer=answer)
        cache = _cache(probe, small, tensor, shards)
        if cache < cfg.row_length * shards:
            small = dataclasses.replace(small, cache_tokens=-(-cfg.row_length // GRAIN) * GRAIN * shards)
            sized.append(dataclasses.replace(smallest, engine=small))
            continue
        slots = _slots(cfg, probe, cache, shards, slice.hosts)
        sized.append(dataclasses.replace(smallest, engine=dataclasses.replace(small, slots=slots, staged=max(slots // 4, shards),
                                                                              cache_tokens=cache)))
    return sized


def _cache(probe: Plan, config: EngineConfig, tensor: int, shards: int) -> int:
    """Positions that fit an engine beside all else."""
    held = sum(probe.held.values()) - probe.held['KV cache']
    free = ROOM * probe.slice.chip.hbm - held - SPARE * max(probe.passing.values())
    positions = free / memory.kv_bytes(probe.model, tensor) - 2 * config.page_size  # nobody's page, and one for a shared last page
    return max(int(positions), 0) * shards // GRAIN * GRAIN


def _slots(cfg: RLConfig, probe: Plan, cache: int, shards: int, hosts: int) -> int:
    """The power of two of slots that decodes all that the cache holds on average, and all that is in flight, as far as SMEM allows."""
    assert probe.rollout is not None
    context = cfg.problems.max_prompt + probe.rollout.answer / 2
    rows = max(min(cache / shards / context, runs.flying(cfg) / (hosts * shards)), 1)
    a_shard = 2 ** math.ceil(math.log2(rows))
    pages = table_width(dataclasses.replace(cfg.engine, max_length=cfg.engine.max_length or cfg.row_length), cfg.model)
    while cfg.model.paged_attention == 'ragged' and a_shard > 1 and memory.table_bytes(a_shard, pages) > SMEM:
        a_shard //= 2
    return a_shard * shards


def confirm(ranked: list[Candidate], slice: Slice, answer: int) -> Iterator[tuple[Candidate, str]]:
    """Compiles candidates in their order; yields each with its compiled plan and why it will not do, '' for one that fits.

    What the first ones needed over their estimates is expected of the others, which are passed over if they will not fit so.
    """
    over, tried = 1.0, 0
    for candidate in ranked:
        if _needed(candidate.plan, over) > ROOM * slice.chip.hbm:
            continue
        if tried == TRIES:
            return
        tried += 1
        try:
            made = plan(candidate.cfg, slice, answer=answer)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            yield candidate, f'libtpu refuses it: {str(error).splitlines()[0][:200]}'
            continue
        yield Candidate(candidate.cfg, made), '' if made.fits else made.blocked or f'needs {_memory(made)} a device'
        held = sum(candidate.plan.held.values())
        over = max(over, (made.peak - held) / (candidate.plan.peak - held))


def _needed(plan: Plan, over: float) -> float:
    held = sum(plan.held.values())
    return held + over * (plan.peak - held)


def table(ranked: list[Candidate]) -> str:
    """The first few, one a line."""
    rl = isinstance(ranked[0].cfg, RLConfig)
    heads = ['mesh', 'remat', 'rows', 'memory', 'executed/model', 'sent/least GB', 'update', 'MFU']
    rows = [heads + ['tensor', 'slots', 'cache', 'step'] * rl] + [_row(one) for one in ranked[:SHOWN]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(one: Candidate) -> list[str]:
    cfg, made = one.cfg, one.plan
    step, seconds = made.step, made.learn_seconds
    row = [_mesh(made), cfg.model.remat, _rows(cfg), _memory(made), f'{step.flops / step.model_flops:.2f}',
           f'{sum(step.sent.values()) / 1e9:,.1f} / {sum(made.least.sent.values()) / 1e9:,.1f}', f'{seconds:,.2f} s',
           f'{step.model_flops / made.slice.chip.flops / seconds:.0%}']
    if isinstance(cfg, RLConfig):
        row += [str(cfg.tensor), str(cfg.engine.slots), f'{cfg.engine.cache_tokens:,}', f'{made.step_seconds:,.0f} s']
    return row


def layout(one: Candidate) -> str:
    """A candidate in a few words."""
    text = f'{_mesh(one.plan)}, remat {one.cfg.model.remat}, {_rows(one.cfg)} rows'
    return text + (f', tensor {one.cfg.tensor}, {one.cfg.engine.slots} slots' if isinstance(one.cfg, RLConfig) else '')


def _mesh(plan: Plan) -> str:
    return ' x '.join(f'{axis} {size}' for axis, size in plan.sizes.items() if size > 1) or 'one device'


def _rows(cfg: Config) -> str:
    """Rows of a micro-batch, and how many make a step."""
    return f'{cfg.batch_size // cfg.accumulation} x {cfg.accumulation}' if isinstance(cfg, SFTConfig) else f'{cfg.micro_rows}'


def _memory(plan: Plan) -> str:
    return f'{plan.peak / 2**30:.1f} of {plan.slice.chip.hbm / 2**30:.0f} GiB'
