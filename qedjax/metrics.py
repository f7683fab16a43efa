"""What a run writes about itself: metrics, progress with an ETA, its resolved config and environment.

Everything here is written by process 0 only, and costs the others nothing.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax

_PACKAGES = ('qedjax', 'jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'transformers',
             'datasets', 'safetensors')

# Dense bf16 peak of one JAX device, by a part of its `device_kind`; the first match wins. Sources: the Cloud TPU system
# architecture pages and NVIDIA data sheets. JAX calls v5e 'TPU v5 lite', v5p 'TPU v5' and v6e 'TPU v6 lite'; a TPU7x chip is two devices.
_PEAK_FLOPS = {
    'TPU v4 lite': 138e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v6': 918e12,
    'TPU7x': 1153.5e12,
    'A100': 312e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'H200 NVL': 835e12,
    'H200': 989e12,
    'GB200': 2500e12,
    'B200': 2250e12,
}


class MetricWriter:
    """Writes scalars to `metrics.jsonl`, to TensorBoard and, if it is installed and WANDB_API_KEY is set, to W&B."""

    def __init__(self, workdir: str | os.PathLike, start: int = 0):
        """Opens the files of a run that continues after step `start`: what was written for later steps is dropped."""
        self._file = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter  # slow to import: it loads torch where torch is installed

        workdir = pathlib.Path(workdir).absolute()
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / 'metrics.jsonl'
        keep_rows(path, start)
        self._file = path.open('a')
        self._tensorboard = SummaryWriter(str(workdir / 'tensorboard'), purge_step=start + 1)
        self._wandb = None
        if os.environ.get('WANDB_API_KEY') and importlib.util.find_spec('wandb'):
            import wandb

            self._wandb = wandb.init(dir=workdir, name=workdir.name, id=str(workdir).strip('/').replace('/', '-')[-64:],
                                     resume='allow')

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds a row of numbers or 0-d arrays. NaN and infinities become strings in it, so that the file stays JSON."""
        if self._file is None:
            return
        values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        row = {'step': step, 'time': round(time.time(), 3), **_finite(values)}
        self._file.write(json.dumps(row, allow_nan=False) + '\n')
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flushes and closes all files."""
        if self._file is None:
            return
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> 'MetricWriter':
        return self

    def __exit__(self, *exception) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class _Mark:
    step: int
    time: float
    tokens: int


class Progress:
    """Step time, tokens/s and ETA: one line that renews itself in a terminal, a line now and then in a log file.

    The first step compiles, so it counts in nothing. Rates are those of the last 20 steps; the ETA comes from the mean
    since the first step, evaluations and checkpoints included.
    """

    def __init__(self, name: str, total: int, *, every: float = 10.0, stream: TextIO | None = None,
                 clock: Callable[[], float] = time.monotonic):
        """A run of `total` steps; in a log file, `every` is the least number of seconds from one line to the next."""
        self._name, self._total, self._clock = name, total, clock
        self._stream = stream or sys.stderr
        self._every = 0.1 if self._stream.isatty() else every
        self._recent: collections.deque[_Mark] = collections.deque(maxlen=21)
        self._first: _Mark | None = None
        self._printed, self._width = -math.inf, 0

    def update(self, step: int, tokens: int = 0, **shown: float) -> dict[str, float]:
        """Call when a step's results are there. Returns 'seconds_per_step' and 'tokens_per_second', but not at first.

        Args:
          step: number of steps done, those before a resume included.
          tokens: processed since the call before.
          shown: numbers to show on the line.
        """
        before = self._recent[-1].tokens if self._recent else 0
        mark = _Mark(step, self._clock(), before + tokens)
        self._recent.append(mark)
        self._first = self._first or mark
        oldest, rates = self._recent[0], {}
        if mark.time > oldest.time:
            rates = {'seconds_per_step': (mark.time - oldest.time) / (mark.step - oldest.step),
                     'tokens_per_second': (mark.tokens - oldest.tokens) / (mark.time - oldest.time)}
        if step >= self._total or mark.time - self._printed >= self._every:
            self._printed = mark.time
            self._print(self._line(mark, rates, shown), last=step >= self._total)
        return rates

    def _line(self, mark: '_Mark', rates: Mapping[str, float], shown: Mapping[str, float]) -> str:
        parts = [f'{self._name} {mark.step}/{self._total} ({100 * mark.step // self._total}%)']
        if rates and self._first:
            mean = (mark.time - self._first.time) / (mark.step - self._first.step)
            parts.append(f'{rates["seconds_per_step"]:.3g} s/step')
            if rates['tokens_per_second']:
                parts.append(f'{rates["tokens_per_second"]:,.0f} tokens/s')
            parts.append(f'ETA {_duration(mean * (self._total - mark.step))}')
        return '  '.join(parts + [f'{name} {value:.4g}' for name, value in shown.items()])

    def _print(self, line: str, last: bool) -> None:
        if jax.process_index() != 0:
            return
        if not self._stream.isatty():
            self._stream.write(line + '\n')
        else:
            line = line[:shutil.get_terminal_size().columns - 1]
            self._stream.write('\r' + line.ljust(self._width) + ('\n' if last else ''))
            self._width = len(line)
        self._stream.flush()


def write_run_files(workdir: str | os.PathLike, config: Any) -> None:
    """Writes `config.json` (the resolved config, a dataclass) and `environment.json` (versions, devices, command)."""
    if jax.process_index() != 0:
        return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    environment = {
        'command': sys.argv,
        'python': platform.python_version(),
        'platform': platform.platform(),
        'packages': {name: version for name in _PACKAGES if (version := _version(name))},
        'backend': jax.default_backend(),
        'device_kind': jax.devices()[0].device_kind,
        'device_count': jax.device_count(),
        'process_count': jax.process_count(),
    }
    for name, content in (('config', dataclasses.asdict(config)), ('environment', environment)):
        text = json.dumps(_finite(content), indent=2, default=str, allow_nan=False)
        (workdir / f'{name}.json').write_text(text + '\n')


def mfu(flops_per_second: float, device: jax.Device | None = None) -> float | None:
    """Share of the dense bf16 peak of one device that `flops_per_second` on it is; None if its peak is not known."""
    peak = peak_flops((device or jax.devices()[0]).device_kind)
    return flops_per_second / peak if peak else None


def peak_flops(kind: str) -> float | None:
    """Dense bf16 FLOPs a second of a JAX device of this kind; None if not known."""
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in kind), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def keep_rows(path: pathlib.Path, last: int) -> None:
    """Keeps the whole rows of a JSONL file up to step `last`, one at a time; a row that a kill cut short is dropped."""
    if not path.exists():
        return
    temporary = path.with_suffix('.tmp')
    with path.open('rb') as old, temporary.open('wb') as new:  # bytes: a kill may have cut a character
        new.writelines(row for row in old if row.endswith(b'}\n') and json.loads(row)['step'] <= last)
    temporary.replace(path)


def drop_torn_row(path: pathlib.Path) -> None:
    """Cuts a JSONL file that a kill left in the middle of a row back to its whole rows."""
    if not path.exists():
        return
    with path.open('rb+') as file:
        end = sum(len(row) for row in file if row.endswith(b'\n'))
        file.truncate(end)


def _finite(value: Any) -> Any:
    """The same JSON value with NaN and infinities as the strings 'nan', 'inf' and '-inf'."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'


@functools.cache
def _compile_count() -> list[int]:
    count = [0]

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        count[0] += event == '/jax/core/compile/backend_compile_duration'

    jax.monitoring.register_event_duration_secs_listener(listen)
    return count


def compilations() -> int:
    """Programs that this process has compiled since it first asked."""
    return _compile_count()[0]
