"""Starts the processes of an ordinary run for `bench engines`, and reads the result that they leave."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil

from snell_scale.config import Config, to_dict
from snell_scale.records import Result, read_result, write_yaml

_LIMIT_SECONDS = 600.0
_SECONDS_TO_END = 20.0
_NO_RESULT = "the run left no result"


def finished_run(config: Config, processes: int, folder: Path, *, threads: int) -> Result:
    """Run `config` on so many processes of this machine, in `folder`; `threads`: CPU threads of each.

    ValueError, with the run's own words, where it does not end well or takes longer than ten minutes.
    """
    own = config.model_copy(update={"output_dir": str(folder)})
    config_file, log = folder / f"{config.name}.yaml", folder / f"{config.name}.log"
    write_yaml(config_file, to_dict(own))
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(config_file, processes),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # a terminal's Ctrl-C is the benchmark's, which ends its processes itself
        )
        try:
            code = process.wait(_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(f"took longer than {_LIMIT_SECONDS:.0f} s") from None
        finally:
            _end(process)
    try:
        result = read_result(folder / config.name)
    except ValueError:
        raise ValueError(_last_words(log, code)) from None
    if result.status != "ok":
        raise ValueError(f"{result.status}: {result.message or _last_words(log, code)}")
    return result


def _command(config_file: Path, processes: int) -> list[str]:
    run = ["run", str(config_file), "--overwrite", "--quiet"]
    if processes == 1:
        return [sys.executable, "-m", "snell_scale.cli", *run]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, "--module", "snell_scale.cli", *run]


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun ends its workers when it is told to; whoever is left is killed."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _last_words(log: Path, code: int) -> str:
    """The run's own error where it told one, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    told = [line for line in lines if re.match(r"(rank \d+ )?error: ", line)]
    last = next(iter(told), None) or next((line for line in reversed(lines) if line), _NO_RESULT)
    return f"exit code {code}: {last}"
