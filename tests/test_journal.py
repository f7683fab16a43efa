"""Chains that are killed between any two calls, or in the middle of a row, go on as if nothing had happened."""

import asyncio
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from qedjax.data.chat import stop_ids
from qedjax.llm.local import LocalEndpoint
from qedjax.model.transformer import Transformer
from qedjax.reasoning_cache.decoder import Decoder, PhaseConfig, RCConfig, Writer, call_seed, decode
from qedjax.reasoning_cache.journal import Journal
from qedjax.reasoning_cache.prompts import RENDERINGS
from qedjax.reasoning_cache.state import State, begin, to_json, trace_from
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, create, make_mesh, make_rollout_mesh
from qedjax.testing import tiny_config, tiny_tokenizer

CFG = RCConfig(3, PhaseConfig(12, 1.0), PhaseConfig(6, 1.0), prompts=RENDERINGS['derivations'])
SIZES = EngineConfig(slots=4, staged=4, max_length=160, cache_tokens=1280, page_size=16, steps=4, prefill_tokens=64, prefill_rows=(1,))
WRITER = Writer(None, tiny_tokenizer('none'))
PROBLEMS = ['1 a+1 b+2', '3 q+4 r*7 s-2', '5 x*3 y-1']


@functools.cache
def engine(thinking):
    model = create(lambda: Transformer(tiny_config(init_std=0.1), jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1]))
    return Engine(model, make_rollout_mesh(), SIZES, 270, tiny_tokenizer(thinking))


class Biased:
    """A model that can write nothing but what a bias leaves."""

    def __init__(self, model, bias):
        self.model, self.bias = model, bias

    async def complete(self, prompt, params):
        return await self.model.complete(prompt, dataclasses.replace(params, logit_bias=self.bias))


def decoded(problems=PROBLEMS, cfg=CFG, thinking='none', path=None, bias=(), **options):
    """Traces of one chain a problem; with a path they are journaled there and begin with what it holds."""
    stops = stop_ids(engine(thinking).tokenizer)

    async def main():
        async with LocalEndpoint(engine(thinking), stops) as endpoint:
            writer = Writer(Biased(endpoint, bias) if bias else endpoint, engine(thinking).tokenizer, stops)
            if path is None:
                return await decode(Decoder(cfg, writer, writer, **options), [(i, begin(State(p)), i) for i, p in enumerate(problems)])
            with Journal(path, {'seed': 0}) as journal:
                decoder = Decoder(cfg, writer, writer, committed=journal.committed)
                return await decode(decoder, [(i, journal.resumed(decoder, i, State(p)), i) for i, p in enumerate(problems)])

    return asyncio.run(main())


def same(traces, others):
    """Whether all is equal, log-probs up to rounding: which rows share a batch decides the order of sums."""

    def without(traces):
        rows = [to_json(trace) for trace in traces]
        for row in rows:
            for call in row['calls']:
                del call['completion']['logprobs']
        return rows

    def logprobs(traces):
        return [logprob for trace in traces for call in trace.calls for logprob in call.completion.logprobs]

    return without(traces) == without(others) and np.allclose(logprobs(traces), logprobs(others), atol=1e-5)


@pytest.mark.parametrize('mode', ['replace', 'append'])
def test_a_kill_anywhere_changes_nothing(tmp_path, mode):
    """The model is random: its summaries hold broken characters and control tokens."""
    cfg = dataclasses.replace(CFG, mode=mode)
    whole = decoded(cfg=cfg, path=tmp_path / 'whole')
    written = (tmp_path / 'whole').read_bytes()
    lines = written.splitlines(keepends=True)
    assert len(lines) == 1 + sum(len(trace.calls) for trace in whole) == 16
    for kept in (0, 1, 2, 9, 15, 16):
        for torn in (b'', b'{"chain": 0, "pha')[kept % 2 :]:
            (tmp_path / 'cut').write_bytes(b''.join(lines[:kept]) + torn)
            again = decoded(cfg=cfg, path=tmp_path / 'cut')
            assert same(again, whole)
            made = (tmp_path / 'cut').read_bytes().splitlines(keepends=True)
            assert (len(made), made[:kept]) == (16, lines[:kept])
            with Journal(tmp_path / 'cut', {'seed': 0}) as journal:
                assert [journal.resumed(Decoder(cfg, WRITER, WRITER), i, State(p)) for i, p in enumerate(PROBLEMS)] == [
                    dataclasses.replace(trace, end='') for trace in again]
    assert same(decoded(cfg=cfg), whole)  # nor does the file
    for trace in whole:
        assert trace_from(json.loads(json.dumps(to_json(trace)))) == trace


def test_the_journal_of_other_chains_is_refused(tmp_path):
    with Journal(tmp_path / 'calls', {'seed': 0, 'pair': (1, 2)}):
        pass
    with Journal(tmp_path / 'calls', {'seed': 0, 'pair': (1, 2)}) as journal:
        assert journal.count == 0
    with pytest.raises(ValueError, match='other problems, settings or weights'):
        Journal(tmp_path / 'calls', {'seed': 1, 'pair': (1, 2)})


def test_a_chain_does_not_depend_on_those_beside_it():
    assert same(decoded(PROBLEMS[:1]), decoded(PROBLEMS)[:1])


def test_every_call_keeps_its_budget_seed_and_versions():
    for i, trace in enumerate(decoded()):
        assert [(call.phase, call.turn) for call in trace.calls] == [
            ('reason', 0), ('summarise', 0), ('reason', 1), ('summarise', 1), ('reason', 2)]
        assert all(len(call.completion.ids) <= (12 if call.phase == 'reason' else 6) for call in trace.calls)
        assert all(len(call.completion.ids) == len(call.completion.logprobs) for call in trace.calls)
        assert all(call.completion.versions in (((0, len(call.completion.ids)),), ()) for call in trace.calls)
        assert len({call_seed(i, call.turn, call.phase) for call in trace.calls}) == 5


@pytest.mark.parametrize(('forced', 'thinking', 'answers', 'cut'), [
    ('S', 'open', ('',) * 3, True),  # thinking that never closes
    ('S', 'hybrid', ('S' * 12,) * 3, True),  # none was begun: all is answer
    ('</think>', 'open', ('</think>' * 11,) * 3, True),  # closed at once, and again and again
    ('<|im_end|>', 'open', ('',) * 3, False), ('<|im_end|>', 'hybrid', ('',) * 3, False)])  # nothing at all
def test_forced_tokens(forced, thinking, answers, cut):
    token = engine(thinking).tokenizer.convert_tokens_to_ids(forced)
    (trace,) = decoded(PROBLEMS[:1], thinking=thinking, bias=((token, 1e9),))
    assert (trace.answers, trace.end) == (answers, 'turns')
    assert trace.answer == ((answers[0], 2) if answers[0] else ('', None))
    assert [len(call.completion.ids) for call in trace.calls] == ([12, 6, 12, 6, 12] if cut else [1] * 5)
    assert all(call.completion.finish_reason == ('length' if cut else 'stop') for call in trace.calls)
    prompt = engine(thinking).tokenizer.decode(trace.calls[2].completion.prompt_ids)
    if forced == 'S' and thinking == 'hybrid':  # the summary, with the very ids that were drawn
        assert trace.states[1].summary[0].ids == (token,) * 6
        assert trace.states[1].summary[0].cut
        assert f'{PROBLEMS[0]}\n{"S" * 6}<|im_end|>' in prompt
    elif forced == '</think>':  # spelled out, and cut to the ids of its budget
        (part,) = trace.states[1].summary
        assert part.cut
        assert len(part.ids) == 6
        assert ('</think>' * 5).startswith(part.text)
        assert token not in trace.calls[2].completion.prompt_ids
    else:
        assert trace.states[1].summary == ()
        assert f'user\n{PROBLEMS[0]}<|im_end|>' in prompt
