"""What a run writes about itself stays readable: strict JSON, each step once, progress that suits its stream."""

import dataclasses
import io
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qedjax import metrics
from qedjax.metrics import MetricWriter, Progress, compilations, drop_torn_row, keep_rows, mfu, write_run_files


def rows(workdir):
    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    return [json.loads(line, parse_constant=refuse) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_rows_are_strict_json(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {'loss': jnp.float32(1.5), 'tokens': 7, 'nan': jnp.nan, 'inf': np.float32('-inf'),
                         'half': jnp.bfloat16(2)})
    (row,) = rows(tmp_path)
    assert row.pop('time') > 1e9
    assert row == {'step': 1, 'loss': 1.5, 'tokens': 7, 'nan': 'nan', 'inf': '-inf', 'half': 2.0}
    assert any((tmp_path / 'tensorboard').iterdir())


def test_resume_keeps_each_step_once(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write(step, {'loss': step})
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 8, "lo')  # killed while writing
    with MetricWriter(tmp_path, start=5) as writer:
        for step in (6, 7):
            writer.write(step, {'loss': 10 * step})
    assert [row['step'] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert [row['loss'] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 60, 70]
    MetricWriter(tmp_path, start=0).close()
    assert rows(tmp_path) == []


def test_rows_are_on_disk_at_once(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {'loss': 1})
        assert len(rows(tmp_path)) == 1


def test_wandb_only_with_a_key(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType('wandb')
    fake.__spec__ = object()
    fake.init = lambda **options: calls.append(options) or types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append('finish'))
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.delenv('WANDB_API_KEY', raising=False)
    MetricWriter(tmp_path / 'a').close()
    assert calls == []
    monkeypatch.setenv('WANDB_API_KEY', 'key')
    with MetricWriter(tmp_path / 'a') as writer:
        writer.write(3, {'loss': 2.0})
    assert calls[0]['resume'] == 'allow'
    assert calls[1:] == [(3, {'loss': 2.0}), 'finish']


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    with MetricWriter(tmp_path / 'a') as writer:
        writer.write(1, {'loss': 1})
    write_run_files(tmp_path / 'a', Outer())
    stream = io.StringIO()
    Progress('sft', 1, stream=stream).update(1)
    assert not (tmp_path / 'a').exists()
    assert stream.getvalue() == ''


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drive(stream, total, seconds, **options):
    """Calls update for each step, which took `seconds[i]`; returns what the calls returned."""
    now = [100.0]
    progress = Progress('sft', total, stream=stream, clock=lambda: now[0], **options)
    returned = []
    for step, took in enumerate(seconds, start=total - len(seconds) + 1):
        now[0] += took
        returned.append(progress.update(step, tokens=1000, loss=1 / step))
    return returned


def test_rates_leave_out_the_compile_step():
    returned = drive(io.StringIO(), 10, [60.0, 2.0, 2.0, 2.0])
    assert returned[0] == {}
    assert returned[1] == returned[3] == {'seconds_per_step': 2.0, 'tokens_per_second': 500.0}


def test_rates_follow_the_last_steps():
    returned = drive(io.StringIO(), 100, [60.0] + 40 * [2.0] + 20 * [4.0])
    assert returned[-1] == {'seconds_per_step': 4.0, 'tokens_per_second': 250.0}


def test_log_file_gets_a_line_now_and_then():
    stream = io.StringIO()
    drive(stream, 40, [60.0] + 20 * [4.0] + [0.5], every=10)
    lines = stream.getvalue().split('\n')
    assert lines[0] == 'sft 19/40 (47%)  loss 0.05263'
    assert lines[1] == 'sft 22/40 (55%)  4 s/step  250 tokens/s  ETA 0:01:12  loss 0.04545'
    assert lines[-2].startswith('sft 40/40 (100%)')
    assert 'ETA 0:00:00' in lines[-2]
    assert len(lines) == 1 + 6 + 1 + 1
    assert '\r' not in stream.getvalue()


def test_terminal_has_one_line(monkeypatch):
    monkeypatch.setenv('COLUMNS', '30')
    stream = Terminal()
    drive(stream, 4, [60.0, 2.0, 0.01, 2.0])
    drawn = stream.getvalue()
    assert drawn.count('\n') == 1
    assert drawn.endswith('\n')
    assert drawn.count('\r') == 3  # the step after 10 ms is not worth a line
    assert all(len(line) <= 29 for line in drawn.strip('\n').split('\r'))


@dataclasses.dataclass
class Inner:
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float = float('inf')


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    name: str = 'é'


def test_run_files(tmp_path):
    write_run_files(tmp_path / 'new', Outer())
    assert json.loads((tmp_path / 'new/config.json').read_text()) == {
        'inner': {'betas': [0.9, 0.95], 'clip': 'inf'}, 'name': 'é'}
    environment = json.loads((tmp_path / 'new/environment.json').read_text())
    assert environment['packages']['jax'] == jax.__version__
    assert (environment['device_kind'], environment['device_count']) == ('cpu', jax.device_count())


@pytest.mark.parametrize(('kind', 'peak'), [
    ('TPU v4', 275), ('TPU v5 lite', 197), ('TPU v5e', 197), ('TPU v5', 459), ('TPU v5p', 459), ('TPU v6 lite', 918),
    ('TPU v6e', 918), ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H200', 989), ('NVIDIA B200', 2250)])
def test_mfu(kind, peak):
    assert mfu(peak * 0.4e12, types.SimpleNamespace(device_kind=kind)) == pytest.approx(0.4)


def test_mfu_of_unknown_devices():
    assert mfu(1e12) is None
    assert metrics.mfu(1e12, types.SimpleNamespace(device_kind='TPU v2')) is None


def test_compilations_are_counted():
    before = compilations()
    jax.jit(lambda x: x * 3 + 1)(np.arange(17))
    assert compilations() > before


def test_rows_up_to_a_step_are_kept_whatever_cut_the_last(tmp_path):
    path = tmp_path / 'rows.jsonl'
    whole = [json.dumps({'step': step, 'text': 'a\u2028∀'}, ensure_ascii=False).encode() + b'\n' for step in (1, 2, 3)]
    path.write_bytes(b''.join(whole) + '{"step": 2, "text": "∀'.encode()[:-1])
    keep_rows(path, 2)
    assert path.read_bytes() == b''.join(whole[:2])
    path.write_bytes(whole[0] + whole[1][:-5])
    drop_torn_row(path)
    assert path.read_bytes() == whole[0]
    drop_torn_row(path)
    drop_torn_row(tmp_path / 'absent.jsonl')
    assert path.read_bytes() == whole[0]
