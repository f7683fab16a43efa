"""SFT of Qwen3-4B-Thinking-2507 on FineProofs-SFT: the first stage of QED-Nano (arXiv 2604.04898).

python launch/sft.py --config=configs/qed_nano_sft.py:v5p-64 --config.init=Qwen3-4B-Thinking-2507 --workdir=/mnt/shared/sft --distributed

The argument is the hardware, which changes no number of the recipe; `init` is the local Hugging Face folder of the base model; the workdir
is on a disk that every host sees. One percent of the rows is held out for the evaluation of each epoch. Reference settings: 620 steps (5
epochs) of about 32 documents, learning rate 3e-5 with cosine decay and 3% warm-up, documents of at most 45,056 tokens (longer ones are
dropped), loss on the thoughts and the proof. A packed row holds as many whole documents as fit, so 16 rows are about 32 documents if they
fill half a row on average; cuDNN's kernel on H100s takes one document a row, so there they are 32 rows. The number of steps is the
reference's, and the log tells how many epochs they make. The checkpoint that RL starts from is that of the third epoch.

Plans: `python tools/plan.py --config=configs/qed_nano_sft.py:HARDWARE --topology=SLICE`, compiled by libtpu 0.0.42.1 or (*) estimated.
Times are at the roofline:

    hardware  slice      peak of HBM      executed/model  step, MFU      the run
    v5p-64    v5p:4x4x4  41.58 of 95 GiB  1.13            1.779 s, 88%   0.01 days = 20 chip-hours
    v6e-64    v6e:8x8    21.97 of 32 GiB  1.22            0.957 s, 82%   0.01 days = 11 chip-hours
    v5e-256   v5e:16x16  9.16 of 16 GiB   1.22            1.115 s, 82%   0.01 days = 49 chip-hours
    h100-8 *  h100:8     26.04 of 80 GiB  1.41            16.434 s, 71%  0.12 days = 23 chip-hours

Never run by us at this size; docs/measurements.md has what was measured.
"""

from qedjax.data.sources import Source
from qedjax.model.config import ModelConfig
from qedjax.sharding import MeshConfig
from qedjax.train.optimizer import OptimizerConfig
from qedjax.train.sft import MonitorConfig, SFTConfig

HARDWARE = {
    'v5p-64': {'fsdp': 16, 'context': 4, 'accumulation': 1, 'batch_size': 16, 'remat': 'dots', 'attention': 'splash'},
    'v6e-64': {'fsdp': 8, 'context': 8, 'accumulation': 2, 'batch_size': 16, 'remat': 'attention', 'attention': 'splash'},
    'v5e-256': {'fsdp': 16, 'context': 16, 'accumulation': 1, 'batch_size': 16, 'remat': 'attention', 'attention': 'splash'},
    'h100-8': {'fsdp': 8, 'context': 1, 'accumulation': 4, 'batch_size': 32, 'remat': 'full', 'attention': 'cudnn'},
}


def get_config(hardware: str = 'v5p-64') -> SFTConfig:
    if hardware not in HARDWARE:
        raise ValueError(f'{hardware!r} is no hardware of this config: choose one of {", ".join(HARDWARE)}; --config.init names the model')
    on = HARDWARE[hardware]
    return SFTConfig(
        init='Qwen3-4B-Thinking-2507',
        model=ModelConfig(param_dtype='float32', dtype='bfloat16', attention=on['attention'], remat=on['remat']),
        train=Source('hub:lm-provers/FineProofs-SFT', name='data', split='train[1%:]'),
        evaluation=Source('hub:lm-provers/FineProofs-SFT', name='data', split='train[:1%]'),
        format='chat',
        turns='last',
        row_length=45_056,
        batch_size=on['batch_size'],
        accumulation=on['accumulation'],
        steps=620,
        save_every=124,
        evaluate_every=124,
        keep=5,
        optimizer=OptimizerConfig(learning_rate=3e-5, schedule='cosine', warmup_fraction=0.03, clip_norm=1.0),
        mesh=MeshConfig(fsdp=on['fsdp'], context=on['context']),
        monitor=MonitorConfig(prompts=32, max_tokens=8192),
        seed=42,
    )
