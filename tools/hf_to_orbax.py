"""Imports a Hugging Face folder.

python tools/hf_to_orbax.py --hf=DIR --orbax=DIR [--dtype=bfloat16]

DIR/checkpoints/0 and DIR/hf_files then are what a run leaves behind: --checkpoint and --config.init take DIR. (They
take the Hugging Face folder as well; importing pays where weights are loaded often.) Needs no torch and no accelerator.
"""

import jax
from absl import flags

from qedjax import cli
from qedjax.checkpoint.convert import hf_to_orbax
from qedjax.model.config import DTYPES

HF = flags.DEFINE_string('hf', None, 'Hugging Face folder to read: config.json, safetensors.', required=True)
ORBAX = flags.DEFINE_string('orbax', None, 'Folder to write; absent or empty.', required=True)
DTYPE = flags.DEFINE_enum('dtype', None, DTYPES, 'Of the parameters; as in the folder by default.')


def main(_) -> None:
    jax.config.update('jax_platforms', 'cpu')  # a run may hold the accelerator
    hf_to_orbax(HF.value, ORBAX.value, DTYPE.value)


if __name__ == '__main__':
    cli.run(main)
