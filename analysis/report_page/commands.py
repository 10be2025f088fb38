"""How a run is made again: its command line, and the state of the code that it ran on."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.groups import is_number
from analysis.load import Row

_OUTPUT = "output_dir=again"  # a run is never done over an earlier one
_VARIABLE = "variables."
_DEVICES = "CUDA_VISIBLE_DEVICES"  # which were free on that machine says nothing about another one
_FUSED_ATTENTION = "TIMM_FUSED_ATTN"
_HASH_DIGITS = 12
# Condition of an estimate's record → the option that sets it.
_ESTIMATE_OPTIONS = {"microbatch_size": "--microbatch", "num_classes": "--num-classes", "target": "--target"}


def command_of(run: Row, environment: Mapping[str, Any]) -> str | None:
    """The command that makes `run` again, started where it was started; None where it left no config.yaml.

    environment: the run's row of `load_environments`; an estimate has none. Variables that change what is
    computed stand in front. Ranks are started on one machine: a record does not know how many it was.
    """
    config = Path(run["folder"]) / "config.yaml"
    if not config.is_file():
        return None
    ranks = str(run["world_size"])
    if run["predicted"]:
        words = ["snell-scale", "estimate", str(config), "--world-size", ranks, *_options_of_estimate(run)]
    elif run["engine"] != "single" or ranks != "1":
        words = ["launch/torchrun.sh", "--nproc-per-node", ranks, str(config), _OUTPUT]
    else:
        words = ["snell-scale", "run", str(config), _OUTPUT]
    settings = [f"{name}={shlex.quote(value)}" for name, value in _variables(run, environment).items()]
    return " ".join([*settings, shlex.join(words)])


def _variables(run: Row, environment: Mapping[str, Any]) -> dict[str, str]:
    """Those that were set; that attention kept its matrices is known of an estimate too, from its conditions."""
    named = {name.removeprefix(_VARIABLE): value for name, value in environment.items() if _VARIABLE in name}
    were_set = {name: value for name, value in named.items() if isinstance(value, str) and name != _DEVICES}
    return {_FUSED_ATTENTION: "0", **were_set} if run.get("fused_attention") is False else were_set


def _options_of_estimate(run: Row) -> list[str]:
    """What the config does not say; an estimate's record has it among its conditions, where it was known."""
    values = {option: run.get(name) for name, option in _ESTIMATE_OPTIONS.items()}
    given = {option: value for option, value in values.items() if value is not None and value == value}
    texts = ((option, f"{value:.0f}" if is_number(value) else str(value)) for option, value in given.items())
    return [word for pair in texts for word in pair]


def code_of(environment: Mapping[str, Any]) -> str | None:
    """The commit that a run's package was at, and whether it had changes; its version where it was installed."""
    commit, version = environment.get("git.commit"), environment.get("snell_scale")
    if environment.get("git.repository") == "package" and isinstance(commit, str):
        return commit[:_HASH_DIGITS] + (" + changes" if _is_true(environment.get("git.dirty")) else "")
    return f"version {version}" if isinstance(version, str) else None


def _is_true(value: Any) -> bool:
    """A flag out of a DataFrame, where what is absent is NaN."""
    return bool(value) and not (isinstance(value, float) and math.isnan(value))
