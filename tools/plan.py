"""Plans a run on accelerators that are not there: what fits, what a step costs, how long the run takes.

python tools/plan.py --config=configs/qed_nano_sft.py --topology=v5p:4x4x4 [--config.mesh.fsdp=8 --config.mesh.context=8 ...]
python tools/plan.py --config=configs/qed_nano_rl.py --topology=h100:64 --answer=30000
python tools/plan.py --config=configs/qed_nano_sft.py --topology=v5e:16x16 --search

TPU slices (v4, v5e, v5p, v6e, v7x) are compiled for with the very programs of the run where the libtpu wheel is installed
(`pip install -e '.[aot]'`), which takes minutes; GPUs (a100, h100, h200), and TPUs without it or with --nocompile, are estimated.
Times are lower bounds: each resource at its peak, and all of them at once.

--search tries meshes, remat policies, micro-batches and sizes of the engine instead of those of the config, ranks what fits by the time of
a step, and has libtpu confirm the best.
"""

import time

import jax
from absl import flags
from ml_collections import config_flags

from qedjax import cli
from qedjax.plan import search
from qedjax.plan.chips import parse_topology
from qedjax.plan.report import report
from qedjax.plan.runs import plan

CONFIG = config_flags.DEFINE_config_file('config', None, 'File with get_config(); --config.NAME=VALUE overrides a field.',
                                         lock_config=True)
TOPOLOGY = flags.DEFINE_string('topology', None, 'Accelerators: v5p:4x4x4, v6e:8x8, v5e:16x16, h100:8, ...', required=True)
COMPILE = flags.DEFINE_bool('compile', True, 'Compile the programs, if libtpu is installed.')
SEARCH = flags.DEFINE_bool('search', False, 'Find the layout with the least time of a step.')
ANSWER = flags.DEFINE_integer('answer', 0, 'Tokens of an answer on average (RL); 0 is max_tokens, the worst case.')


def main(_) -> None:
    if CONFIG.value is None:
        raise ValueError('no --config: name one of configs/*.py, e.g. --config=configs/qed_nano_sft.py')
    _ = CONFIG.value.mesh  # of a file that is missing or broken, any field raises what is wrong with it
    slice = parse_topology(TOPOLOGY.value)
    jax.config.update('jax_platforms', 'cpu')  # nothing runs here
    start = time.monotonic()
    title = flags.FLAGS['config'].config_filename
    if SEARCH.value:
        for text in search.tell(CONFIG.value, slice, title, compile=COMPILE.value, answer=ANSWER.value):
            print(text, flush=True)
    else:
        print(report(plan(CONFIG.value, slice, compile=COMPILE.value, answer=ANSWER.value), title))
    print(f'- planned in {time.monotonic() - start:.0f} s')


if __name__ == '__main__':
    cli.run(main)
