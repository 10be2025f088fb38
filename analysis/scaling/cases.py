"""Runs → cases: what is equal but for the seed, measured or predicted, and the peak of its fullest rank."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from analysis.groups import is_number, method_name, value_text
from analysis.load import Row, rows_of
from analysis.rows import CONDITIONS
from snell_scale.records import MEMORY_CATEGORIES, STATUSES

# Methods whose adapters have a rank; of the others a record's method.r means nothing.
RANKED = ("lora", "shira", "klora", "snell", "snella")
WORLD = ("world_size", "batch_size", "microbatch_size")
# What else holds for a whole family of runs; the seed of the data, threads and host do not change memory.
_CONSTANT = (
    "model",
    "dataset",
    "task",
    "precision",
    *(name for name in CONDITIONS if name not in (*WORLD, "data_seed", "num_threads", "deterministic")),
    "memory_device",
    "memory_source",
)
_NAMES = ("varied.case", "varied.config")  # chosen by a person for a combination of settings
# Columns of their own, and what changes no memory.
_NO_SETTING = tuple(
    f"varied.{key}"
    for key in (
        "seed",
        "method.name",
        "method.r",
        "world_size",
        "engine.name",
        "training.batch_size",
        "training.lr",
    )
)
_LONGEST_MODEL = 28
_CATEGORY_KEYS = tuple(f"peak_{category}_mib" for category in MEMORY_CATEGORIES)


def scaling_cases(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per case and status: runs that differ in nothing but the seed.

    Columns: label (method, rank and what else of the method differs), method, rank (NaN where it has none),
    engine (with what of it is varied), the settings (model, world_size, batch_size, conditions …), architecture
    (the model as the records name it), predicted, status, n, num_total_params, trainable_percent, images_per_s,
    wire_bytes_per_rank, peak_mib (mean over seeds of the fullest rank), peak_<category>_mib, folder (of one run);
    `job`, equal where all but method, engine, ranks and batch is equal, and `setting`, where these three are too:
    what a saving may be computed in.
    """
    runs = _with_named_models(runs.reset_index(drop=True))
    runs = runs.assign(rank=[_rank(run) for run in rows_of(runs)])
    of_method, of_engine, others = _varied(runs)
    constant = [name for name in (*_CONSTANT, *others, "predicted") if name in runs]
    runs = runs.assign(
        engine=[_with_values(run["engine"], run, of_engine) for run in rows_of(runs)],
        variant=_joined(runs, of_method),
        job=_joined(runs, constant),
        label=_labels(runs, of_method),
    )
    runs = runs.assign(setting=runs["job"] + "\n" + _joined(runs, ("engine", *WORLD)))
    groups = runs.groupby(["setting", "method", "rank", "variant", "status"], dropna=False, sort=False)
    table = pd.DataFrame([_case(group) for _, group in groups])
    order = [(_place(row), index) for index, row in enumerate(rows_of(table))]
    return table.iloc[[index for _, index in sorted(order)]].reset_index(drop=True)


def has_peak(cases: pd.DataFrame) -> pd.DataFrame:
    """The cases whose peak is a training step's: not where memory ran out on the way there."""
    return cases.loc[cases["predicted"] | (cases["status"] == "ok")].dropna(subset=["peak_mib"])


def params_text(count: float) -> str:
    """86.6M, 1.2B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{suffix}"
    return f"{count:g}"


def memory_text(mib: float) -> str:
    """ "12.3 GiB", "640 MiB"."""
    return "–" if math.isnan(mib) else f"{mib / 1024:.3g} GiB" if mib >= 1024 else f"{mib:.3g} MiB"


def short_model(model: object) -> str:
    """The architecture without its arguments, for figures."""
    name = str(model).partition("(")[0]
    return name if len(name) <= _LONGEST_MODEL else f"{name[: _LONGEST_MODEL - 1]}…"


def listed(parts: Sequence[str], *, most: int) -> str:
    """The first `most` of them, and how many more there are."""
    more = f"; and {len(parts) - most} more" if len(parts) > most else ""
    return "; ".join(parts[:most]) + more


def differing(cases: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Those of `names` that have more than one value in `cases`."""
    return [name for name in names if name in cases and cases[name].nunique(dropna=False) > 1]


def _rank(run: Row) -> float:
    """Of the methods that have one: as varied, or as the run's config has it; NaN where neither tells."""
    if run["method"] not in RANKED:
        return math.nan
    varied = run.get("varied.method.r", math.nan)
    if is_number(varied):
        return float(varied)
    try:
        text = (Path(run["folder"]) / "config.yaml").read_text(encoding="utf-8")
        rank = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["method"]["r"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return math.nan  # the record was moved without its config, or that is damaged
    return float(rank) if is_number(rank) else math.nan


def _with_named_models(runs: pd.DataFrame) -> pd.DataFrame:
    """Where a study's names ("ViT-B/16") and its models go together one to one, the models bear these names.

    The names are then no variants of the methods: a method's line goes through all sizes. Column `architecture`
    has what the records say.
    """
    runs = runs.assign(architecture=runs["model"])
    for column in [name for name in _NAMES if name in runs]:  # in one order, for equal pages of equal data
        pairs = runs[["model", column]].drop_duplicates()
        models, chosen = pd.Series(pairs["model"]), pd.Series(pairs[column]).dropna()
        if len(chosen) > 1 and chosen.is_unique and models.is_unique:
            runs = runs.assign(model=runs[column].fillna(runs["model"])).drop(columns=column)
    return runs


def _varied(runs: pd.DataFrame) -> tuple[list[str], list[str], list[str]]:
    """The varied columns that belong to the method, to the engine, and to neither."""
    varied = [str(name) for name in runs if str(name).startswith("varied.") and name not in _NO_SETTING]
    of_method = [name for name in varied if name.startswith("varied.method.") or name in _NAMES]
    of_engine = [name for name in varied if name.startswith("varied.engine.")]
    return of_method, of_engine, [name for name in varied if name not in (*of_method, *of_engine)]


def _joined(runs: pd.DataFrame, names: Sequence[str]) -> pd.Series:
    parts = [runs[name].map(lambda value: "" if pd.isna(value) else str(value)) for name in names]
    rows = zip(*parts, strict=True) if parts else ((),) * len(runs)
    return pd.Series(["\n".join(row) for row in rows], index=runs.index, dtype=object)


def _labels(runs: pd.DataFrame, of_method: Sequence[str]) -> list[str]:
    told = [name for name in of_method if runs[name].nunique(dropna=False) > 1]
    several_ranks = runs["rank"].nunique() > 1
    labels = []
    for run in rows_of(runs):
        name = method_name(str(run["method"]))
        name += f", r={run['rank']:g}" if several_ranks and not math.isnan(run["rank"]) else ""
        labels.append(_with_values(name, run, told))
    return labels


def _with_values(name: str, run: Row, keys: Sequence[str]) -> str:
    """The name and the run's values of these varied keys: "deepspeed, stage=3"."""
    values = [
        str(run[key]) if key in _NAMES else f"{key.rsplit('.', 1)[-1]}={value_text(run[key])}"
        for key in keys
        if not pd.isna(run[key])
    ]
    return ", ".join([name, *values])


def _case(group: pd.DataFrame) -> Row:
    same = [name for name in (*_CONSTANT, *WORLD) if name in group]
    names = ("label", "method", "rank", "engine", "architecture", "job", "setting", "predicted", "status")
    row: Row = {name: group[name].iloc[0] for name in (*names, "folder", *same)}
    means = ("num_total_params", "trainable_percent", "images_per_s", "wire_bytes_per_rank", *_CATEGORY_KEYS)
    row |= {name: group[name].mean() for name in means}
    peak = group["rank_peak_max_mib"].fillna(group["peak_total_mib"])
    return row | {"predicted": bool(row["predicted"]), "peak_mib": peak.mean(), "n": len(group)}


def _place(row: Row) -> tuple[object, ...]:
    size = row["num_total_params"]
    return (
        math.inf if math.isnan(size) else round(math.log(size), 1),  # adapters of any size: one model
        str(row["model"]),
        str(row["engine"]),
        row["world_size"],
        row["batch_size"],
        str(row["setting"]),
        str(row["label"]),
        STATUSES.index(str(row["status"])),
    )
