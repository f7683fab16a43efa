"""Time and peak memory of the conversion both ways, beside `cp` of the same bytes. Three copies of the weights must fit.

python tools/bench_convert.py --workdir=DIR [--preset=qwen3_4b_2507 | --hf=DIR]

Makes a random folder of the preset's size in the workdir unless --hf names one. A time ends when the bytes are on the
disk (sync); a peak is that of the process's resident memory, mapped pages of files included.
"""

import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import numpy as np
from absl import flags

from qedjax import cli
from qedjax.checkpoint.safetensors_io import read_folder

TOOLS = pathlib.Path(__file__).absolute().parent
PRESET = flags.DEFINE_string('preset', 'qwen3_4b_2507', 'Size of the random model, a function of model/presets.py.')
HF = flags.DEFINE_string('hf', None, 'Hugging Face folder to convert instead.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for what is written; deleted in the end.', required=True)


def main(_) -> None:
    workdir = pathlib.Path(WORKDIR.value)
    workdir.mkdir(parents=True)
    hf, orbax, back, copy = pathlib.Path(HF.value or workdir / 'hf'), workdir / 'orbax', workdir / 'back', workdir / 'copy'
    try:
        if not HF.value:
            measure(*tool('make_random_hf', preset=PRESET.value, hf=hf))
        rows = {'cp': measure('cp', '-rL', hf, copy)}
        shutil.rmtree(copy)
        rows['hf_to_orbax'] = measure(*tool('hf_to_orbax', hf=hf, orbax=orbax))
        rows['orbax_to_hf'] = measure(*tool('orbax_to_hf', orbax=orbax, hf=back))
        rows['cp again'] = measure('cp', '-rL', hf, copy)
        report(hf, back, rows)
    finally:
        shutil.rmtree(workdir)


def tool(name: str, **flag_values) -> list[str]:
    return [sys.executable, str(TOOLS / f'{name}.py'), *(f'--{flag}={value}' for flag, value in flag_values.items())]


def measure(*command) -> tuple[float, int]:
    """Seconds and peak bytes of a command, which must succeed."""
    start = time.monotonic()
    process = subprocess.Popen(list(map(str, command)))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f'{" ".join(map(str, command))} ended with {process.returncode}')
    os.sync()
    return time.monotonic() - start, usage.ru_maxrss * 1024


def report(hf: pathlib.Path, back: pathlib.Path, rows: dict[str, tuple[float, int]]) -> None:
    there, here = read_folder(hf), read_folder(back)
    size = sum(entry.nbytes for entry in there.values())
    equal = there.keys() == here.keys() and all(
        np.array_equal(entry.view().view(np.uint8), here[name].view().view(np.uint8)) for name, entry in there.items())
    print(f'{platform.platform()}, {os.cpu_count()} cores; weights {size / 2**30:.2f} GiB; '
          f'tensors after both ways {"bit-equal" if equal else "DIFFERENT"}')
    fastest = min(rows['cp'][0], rows['cp again'][0])
    for name, (seconds, peak) in rows.items():
        memory = '' if name.startswith('cp') else f'  peak {peak / 2**30:.2f} GiB = weights {(peak - size) / 2**30:+.2f}'
        print(f'{name:12} {seconds:7.1f} s  {size / seconds / 1e6:7.0f} MB/s  {seconds / fastest:5.1f} x cp{memory}')


if __name__ == '__main__':
    cli.run(main)
