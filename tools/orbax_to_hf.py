"""Exports a checkpoint to a Hugging Face folder.

python tools/orbax_to_hf.py --orbax=DIR --hf=DIR [--dtype=bfloat16] [--verify]

--orbax is a run's workdir (its newest complete step is taken), its checkpoints folder, or one step. Tokenizer,
template, generation_config and licence come from the run's hf_files, unchanged. Needs no torch and no accelerator.
"""

import jax
from absl import flags
from compare_logits import verify_logits

from qedjax import cli
from qedjax.checkpoint.convert import orbax_to_hf

ORBAX = flags.DEFINE_string('orbax', None, 'Workdir, checkpoints folder or step to read.', required=True)
HF = flags.DEFINE_string('hf', None, 'Folder to write; absent or empty.', required=True)
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16', 'float16'], 'Of the weights; default: the checkpoint.')
FILES = flags.DEFINE_string('files', None, 'Folder whose other files are carried over; hf_files of the run by default.')
VERIFY = flags.DEFINE_bool('verify', False, 'Compare every tensor written and, with torch, logits with transformers.')
LOGITS_UP_TO = flags.DEFINE_float('logits_up_to', 2e9, 'Parameters above which --verify leaves the logits out.')


def main(_) -> None:
    jax.config.update('jax_platforms', 'cpu')  # a run may hold the accelerator
    orbax_to_hf(ORBAX.value, HF.value, dtype=DTYPE.value, files=FILES.value, verify=VERIFY.value)
    if VERIFY.value:
        verify_logits(HF.value, LOGITS_UP_TO.value)


if __name__ == '__main__':
    cli.run(main)
