"""SFT of SmolLM2-135M-Instruct on short worked answers to one-step word problems: where RL on them starts.

python tools/word_problems.py --mawps=mawps_singleop.jsonl --out=runs/wordproblems
python launch/sft.py --config=configs/smollm2_wordproblems_sft.py:SMOLLM2_DIR,runs/wordproblems --workdir=runs/wordproblems/sft

The arguments are the model's Hugging Face folder and the folder of the data. 32 steps of about 16 answers at 1e-4 bring
accuracy at T=1 to 0.30; half a minute on a GPU.
"""

from qedjax.data.sources import Source
from qedjax.model.config import ModelConfig
from qedjax.sharding import MeshConfig
from qedjax.train.optimizer import OptimizerConfig
from qedjax.train.sft import SFTConfig


def get_config(folders: str = 'SmolLM2-135M-Instruct,runs/wordproblems') -> SFTConfig:
    model, data = folders.split(',')
    return SFTConfig(
        init=model,
        model=ModelConfig(param_dtype='float32', dtype='float32', attention_block=128, remat='none'),
        train=Source(f'{data}/sft.jsonl'),
        format='pair',
        row_length=512,
        batch_size=3,
        steps=32,
        save_every=32,
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule='constant', warmup_fraction=0.1, clip_norm=1.0),
        mesh=MeshConfig(data=-1, fsdp=1),
    )
