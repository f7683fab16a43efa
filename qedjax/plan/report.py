"""A plan as a table for people."""

import math

from qedjax.plan.runs import ROOM, Plan

GIB = 2**30


def report(plan: Plan, title: str) -> str:
    """The whole table."""
    mesh = ', '.join(f'{axis} {size}' for axis, size in plan.sizes.items() if size > 1) or 'one device'
    how = 'compiled by libtpu' if plan.compiled else 'estimated'
    lines = [f'{title} on {plan.slice.name}: {plan.slice.chips} chips, mesh {mesh}, remat {plan.model.remat} ({how})', '']
    parts = {'memory a device': _memory, 'one step': _work, 'sent by a device in a step': _sent, 'sampling': _sampling, 'the run': _run}
    for name, part in parts.items():
        rows = part(plan)
        if rows:
            lines += [name, *(f'  {label:<36} {value}' for label, value in rows), '']
    lines += [f'- {text}' for text in plan.checks + plan.notes]
    return '\n'.join(lines)


def _memory(plan: Plan) -> list[tuple[str, str]]:
    rows = [(name, f'{size / GIB:8.2f} GiB') for name, size in plan.held.items()]
    rows += [(f'+ {name}', f'{size / GIB:8.2f} GiB') for name, size in plan.passing.items()]
    share = plan.peak / plan.slice.chip.hbm
    fits = 'fits' if share <= ROOM else f'DOES NOT FIT: above {ROOM:.0%}'
    return [*rows, ('peak', f'{plan.peak / GIB:8.2f} GiB of {plan.slice.chip.hbm / GIB:.0f} GiB = {share:.0%}, {fits}')]


def _work(plan: Plan) -> list[tuple[str, str]]:
    step, seconds = plan.step, plan.step.seconds(plan.slice)
    best, worst = plan.learn_seconds, sum(seconds.values())
    peak = plan.slice.chip.flops
    rows = [('tokens', f'{plan.tokens:,.0f}'), ('model FLOPs a device', f'{step.model_flops / 1e12:,.1f} T'),
            ('executed FLOPs a device', f'{step.flops / 1e12:,.1f} T = {step.flops / step.model_flops:.2f} of the model\'s')]
    rows += [(f'least time: {name}', f'{value:.3f} s') for name, value in seconds.items()]
    return [*rows, ('update, all overlapped', f'{best:.3f} s, MFU {step.model_flops / peak / best:.0%}'),
            ('update, nothing overlapped', f'{worst:.3f} s, MFU {step.model_flops / peak / worst:.0%}')]


def _sent(plan: Plan) -> list[tuple[str, str]]:
    def row(name: str, amount: float, least: float) -> tuple[str, str]:
        return name, f'{amount / 1e9:9.2f} GB; the layout needs {least / 1e9:.2f} GB' + (f' ({amount / least:.2f})' if least else '')

    rows = [row(kind, plan.step.sent.get(kind, 0.0), plan.least.sent.get(kind, 0.0)) for kind in {**plan.least.sent, **plan.step.sent}]
    if not plan.compiled:
        return [(kind, f'{amount / 1e9:9.2f} GB') for kind, amount in plan.least.sent.items()]
    total = sum(plan.step.sent.values())
    rows.append(row('all', total, sum(plan.least.sent.values())))
    return [*rows, ('beside other work', f'{plan.step.hidden / total:9.0%} of these bytes')] if total else rows


def _sampling(plan: Plan) -> list[tuple[str, str]]:
    rollout = plan.rollout
    if rollout is None:
        return []
    return [('engines', f'{rollout.engines}, one a host'),
            ('cache, as configured', f'{rollout.cache_tokens:,.0f} positions in all engines'),
            ('cache that fits', f'{rollout.fitting_tokens:,.0f} positions'),
            ('full answers in flight', f'{rollout.in_flight:,.0f} of prompt and {rollout.answer:,} tokens'),
            ('rows decoded at a time', f'{rollout.decoding.rows:,.1f} on a data shard'),
            ('decode step', f'{rollout.decoding.seconds * 1e3:.1f} ms'),
            ('tokens a second', f'{rollout.decoding.rate * rollout.engines:,.0f}'),
            ('answers of a step', f'{rollout.seconds:,.0f} s')]


def _run(plan: Plan) -> list[tuple[str, str]]:
    if not plan.steps:
        return []
    days = plan.steps * plan.step_seconds / 86400
    if not math.isfinite(days):
        return [('steps', f'{plan.steps}'), ('time', 'none: not one answer fits the cache')]
    return [('steps', f'{plan.steps}'), ('time of a step, at the roofline', f'{plan.step_seconds:,.2f} s'),
            ('time of the run, at the roofline', f'{days:.2f} days = {days * 24 * plan.slice.chips:,.0f} chip-hours'),
            ('the same at 40% of the roofline', f'{days / 0.4:.2f} days = {days / 0.4 * 24 * plan.slice.chips:,.0f} chip-hours')]
