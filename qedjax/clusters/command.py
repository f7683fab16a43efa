"""The command of a job: one of the launch scripts with its flags, the environment by name, the commit that it runs."""

import os
import pathlib
import re
import subprocess
from collections.abc import Sequence

SCRIPTS = ('launch/sft.py', 'launch/rl.py', 'launch/generate.py')


def script_command(words: Sequence[str], processes: int, *, absolute: bool = False) -> list[str]:
    """The script and its flags, with --distributed where several processes make one run.

    Args:
      words: what the user gave after `--`: the script first.
      processes: how many of them are started.
      absolute: whether paths must be absolute, because the job starts in a folder of its own.

    Raises ValueError for a script that is not there or cannot be run so, and for a word that a shell would not get whole.
    """
    if not words or words[0] not in SCRIPTS:
        raise ValueError(f'after -- comes one of {", ".join(SCRIPTS)} with its flags, not {words[0] if words else "nothing"!r}')
    path, flags = pathlib.Path(words[0]), list(words[1:])
    if not path.is_file():
        raise ValueError(f'{path} is not here; start this from the root of the repository')
    if any('\n' in word or '\0' in word for word in flags):
        raise ValueError('a flag of the script holds a line break; put such a text into a config file')
    if absolute:
        _require_absolute(flags)
    distributed = {'--distributed', '--distributed=true', '--distributed=True'} & set(flags)
    if processes > 1 and not distributed:
        if "'distributed'" not in path.read_text():
            raise ValueError(f'{path} runs in one process, but this would start {processes}; choose a slice or a job of one host')
        flags.append('--distributed')
    return [words[0], *flags]


def _require_absolute(flags: Sequence[str]) -> None:
    """Refuses a folder that each host would take for one of its own."""
    for flag, following in zip(flags, [*flags[1:], ''], strict=True):
        name, equals, value = flag.lstrip('-').partition('=')
        value = value if equals else following
        if flag.startswith('-') and name in ('workdir', 'output') and not value.startswith('/'):
            raise ValueError(f'--{name}={value} must be an absolute path, on a disk that every host sees and that outlives them')


def require_environment(names: Sequence[str]) -> None:
    """Raises ValueError unless each is the name, and the name alone, of a variable that is set; never shows a value."""
    for name in names:
        if not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', name):
            raise ValueError(f'--env takes the bare names of variables, e.g. HF_TOKEN,OPENAI_API_KEY; look at {name.partition("=")[0]!r}')
        if name not in os.environ:
            raise ValueError(f'--env names {name}, which is not set in this environment; export it first')


def require_name(name: str) -> None:
    """Raises ValueError unless Google Cloud, Kubernetes and a file system all take the name."""
    if not re.fullmatch('[a-z]([-a-z0-9]{0,38}[a-z0-9])?', name):
        raise ValueError(f'--name={name} must be at most 40 lower-case letters, digits and dashes, from a letter to no dash')


def resolve_commit(commit: str) -> str:
    """The full hash of a commit of this repository."""
    done = subprocess.run(['git', 'rev-parse', '--verify', '--quiet', f'{commit}^{{commit}}'], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f'--commit={commit} is no commit of a git repository here')
    return done.stdout.strip()


def uncommitted() -> bool:
    """Whether files differ from the last commit: what is not committed is not sent."""
    return bool(subprocess.run(['git', 'status', '--porcelain', '-uno'], capture_output=True, text=True, check=False).stdout.strip())
