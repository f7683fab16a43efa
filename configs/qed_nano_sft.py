"""SFT of Qwen3-4B-Thinking-2507 on FineProofs-SFT: the first stage of QED-Nano (arXiv 2604.04898).

python launch/sft.py --config=configs/qed_nano_sft.py:Qwen3-4B-Thinking-2507 --workdir=/mnt/shared/sft --distributed

The argument is the local Hugging Face folder of the base model; the workdir is on a disk that every host sees. One percent of the rows is
held out for the evaluation of each epoch. Reference settings: 620 steps (5 epochs) of about 32 documents, learning rate
3e-5 with cosine decay and 3% warm-up, documents of at most 45,056 tokens (longer ones are dropped), loss on the thoughts and the proof.
A packed row holds as many whole documents as fit, so 16 rows are about 32 documents if they fill half a row on average; the number of
steps is the reference's, and the log tells how many epochs they make. The checkpoint that RL starts from is that of the third epoch.

Hardware: 64 chips of TPU v5p in this mesh (4 rows of 16 devices each hold a sequence of 45,056 positions in 4 parts); for others change
--config.mesh. Never run by us at this size; docs/measurements.md has what was measured.
"""

from qedjax.data.sources import Source
from qedjax.model.config import ModelConfig
from qedjax.sharding import MeshConfig
from qedjax.train.optimizer import OptimizerConfig
from qedjax.train.sft import MonitorConfig, SFTConfig


def get_config(model: str = 'Qwen3-4B-Thinking-2507') -> SFTConfig:
    return SFTConfig(
        init=model,
        model=ModelConfig(param_dtype='float32', dtype='bfloat16', attention='splash', remat='full'),
        train=Source('hub:lm-provers/FineProofs-SFT', name='data', split='train[1%:]'),
        evaluation=Source('hub:lm-provers/FineProofs-SFT', name='data', split='train[:1%]'),
        format='chat',
        turns='last',
        row_length=45_056,
        batch_size=16,
        steps=620,
        save_every=124,
        evaluate_every=124,
        keep=5,
        optimizer=OptimizerConfig(learning_rate=3e-5, schedule='cosine', warmup_fraction=0.03, clip_norm=1.0),
        mesh=MeshConfig(fsdp=16, context=4),
        monitor=MonitorConfig(prompts=32, max_tokens=8192),
        seed=42,
    )
