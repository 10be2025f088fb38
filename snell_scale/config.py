"""The configuration of a run: strict, frozen pydantic models.

Components (model, data, task, method, engine)
are validated by the config class that their file defines; who loads a config passes the look-up, so that
this module knows none of them.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from snell_scale.config_sources import COMPONENT_KINDS, read_yaml, with_overrides

STUDY_KEYS = ("grid", "cases")

ConfigClassLookup = Callable[[str, object], type["StrictModel"]]


Beta = Annotated[float, Field(ge=0, lt=1)]


class StrictModel(BaseModel):
    """Base of every config: frozen, unknown keys refused, no silent conversion of strings to numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, data: Any) -> Any:
        """YAML has lists only; a frozen config holds tuples."""
        if not isinstance(data, Mapping):
            return data
        return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


class TrainingConfig(StrictModel):
    """How long, how fast and in which arithmetic."""

    epochs: float | None = Field(default=None, gt=0, description="Length in passes over the training split.")
    steps: int | None = Field(default=None, gt=0, description="Length in optimizer steps; instead of epochs.")
    batch_size: int = Field(gt=0, description="Images per optimizer step, over all ranks and microbatches.")
    gradient_accumulation: int = Field(default=1, gt=0, description="Microbatches per optimizer step.")
    lr: float = Field(gt=0, description="Peak learning rate.")
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end of the cosine.")
    warmup_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps with a linear warm-up."
    )
    weight_decay: float = Field(ge=0, description="AdamW's; biases, norms and 1-D parameters are exempt.")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip_grad_norm: float | None = Field(default=None, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1, description="Evaluate and save averaged weights.")
    activation_checkpointing: bool = False
    num_workers: int = Field(default=0, ge=0, description="Processes of each rank that read and augment samples.")
    compile: bool = Field(default=False, description="torch.compile the module.")
    deterministic: bool = Field(default=False, description="Only deterministic algorithms; slower on a GPU.")

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of training.epochs and training.steps")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"training.batch_size={self.batch_size} is not a multiple of "
                f"gradient_accumulation={self.gradient_accumulation}; change one of them"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"training.min_lr={self.min_lr} is above lr={self.lr}; lower it")
        return self


class EvaluationConfig(StrictModel):
    """Validation chooses the weights, test reports once."""

    every_steps: int | None = Field(
        default=None, gt=0, description="Optimizer steps between two evaluations on validation."
    )
    every_epochs: float | None = Field(
        default=None, gt=0, description="The same in passes over the training split; instead of every_steps."
    )
    batch_size: int = Field(gt=0)
    protocol: Literal["validation", "best-test"] = Field(
        default="validation",
        description="'best-test' is the published protocol (the best epoch on the TEST split): optimistic, "
        "labelled in the record, for comparison with published tables only.",
    )
    pictures_every: int | None = Field(
        default=None,
        gt=0,
        description="Write the task's pictures at every so many evaluations too; null: only when training ends.",
    )

    @model_validator(mode="after")
    def _check(self) -> "EvaluationConfig":
        if (self.every_steps is None) == (self.every_epochs is None):
            raise ValueError("give exactly one of evaluation.every_steps and evaluation.every_epochs")
        return self


class CheckpointConfig(StrictModel):
    """When a run can be resumed from."""

    every_steps: int | None = Field(default=None, gt=0, description="null: only when the run ends or is stopped.")
    keep_last: int = Field(default=2, gt=0)
    asynchronous: bool = Field(
        default=False, description="Write in the background, from copies on the host; training goes on."
    )


class LoggingConfig(StrictModel):
    """How often a step is written to steps.jsonl, and which steps are measured."""

    every_steps: int = Field(default=10, gt=0)
    memory_at_step: int | None = Field(
        default=3,
        gt=0,
        description="The one optimizer step whose memory is measured, tensor by tensor (slow); null: none.",
    )
    warmup_steps: int = Field(default=5, ge=0, description="First steps left out of the throughput.")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), description="Where the logged figures go too; tensorboard needs no package."
    )
    memory_snapshot: bool = Field(
        default=False,
        description="On CUDA write torch's memory snapshot after the measured step, and where memory runs out; "
        "slows the steps up to the measured one.",
    )


class Config(StrictModel):
    """One run, fully resolved."""

    name: str = Field(min_length=1, description="Folder below output_dir, and the run's name in reports.")
    output_dir: str = "runs"
    seed: int = Field(default=0, ge=0, lt=2**63)
    data_seed: int = Field(
        default=0, ge=0, lt=2**63, description="Chooses the splits; apart from the run's seed."
    )
    model: Any
    data: Any
    task: Any
    method: Any
    engine: Any
    training: TrainingConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    notes: str = ""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if Path(self.name).is_absolute() or not Path(self.name).parts or ".." in Path(self.name).parts:
            raise ValueError(f"name is {self.name!r}, expected a folder below output_dir; set output_dir instead")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = (), *, config_class: ConfigClassLookup) -> Config:
    """Read `path` (with what it extends), apply `key=value` overrides, validate everything.

    config_class: (kind, name) → the component's config class, usually `registry.config_class`.
    Raises ValueError with one line per mistake: the key, what came, and the nearest valid key.
    """
    raw = read_yaml(path)
    for key in (*STUDY_KEYS, "configs"):
        if raw.pop(key, None) is not None:
            raise ValueError(f"{path} is a study (it has '{key}:'): use `snell-scale compare {path}`")
    return resolve(raw, overrides, config_class=config_class, source=str(path))


def resolve(
    raw: Mapping[str, Any], overrides: Sequence[str], *, config_class: ConfigClassLookup, source: str
) -> Config:
    """A validated Config from nested dictionaries and overrides; see `load_config`."""
    _check_variants(raw, config_class)
    merged = with_overrides(raw, overrides)
    errors: list[str] = []
    for kind in COMPONENT_KINDS:
        if kind in merged:
            merged[kind] = _component(kind, merged[kind], config_class, errors)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        errors += _explain(error, Config, prefix="")
    if errors:
        raise ValueError(f"{source} is not a valid config:\n" + "\n".join(f"  - {e}" for e in errors))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data of a resolved config; `resolve` reads it back to an equal Config."""
    plain = config.model_dump(mode="json")
    for kind in COMPONENT_KINDS:
        plain[kind] = getattr(config, kind).model_dump(mode="json")
    return plain


def json_schema(components: Mapping[str, Mapping[str, type[StrictModel]]]) -> dict[str, Any]:
    """JSON schema of a config file; each component is one of its registered classes, told apart by name."""
    schema = Config.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    for kind, classes in components.items():
        options = []
        for name, cls in classes.items():
            sub = cls.model_json_schema(ref_template="#/$defs/{model}")
            definitions.update(sub.pop("$defs", {}))
            definitions[f"{kind}.{name}"] = sub
            options.append({"$ref": f"#/$defs/{kind}.{name}"})
        schema["properties"][kind] = {"oneOf": options, "title": kind}
    # A file may leave out what it extends, so nothing is required of a single file.
    schema.pop("required", None)
    extra = {"type": "object", "description": "Method name → settings that hold when it is chosen."}
    schema["properties"] |= {
        "extends": {"type": "string", "description": "Path of the config that this one changes."},
        "variants": extra,
        "grid": {"type": "object", "description": "Dotted key → list of values; every combination is run."},
        "configs": {
            "type": "array",
            "description": "Config files, each run under the grid; stands beside it only.",
        },
        "cases": {"type": "object", "description": "Label → {dotted key: value}; each is run."},
    }
    return schema


def _check_variants(raw: Mapping[str, Any], config_class: ConfigClassLookup) -> None:
    variants = raw.get("variants") or {}
    if not isinstance(variants, Mapping):
        raise ValueError(f"variants is {variants!r}, expected a mapping: method name → settings")
    for name, settings in variants.items():
        config_class("method", name)  # raises for a name that is no method
        if not isinstance(settings, Mapping):
            raise ValueError(f"variants.{name} is {settings!r}, expected a mapping of settings")


def _component(kind: str, raw: Any, config_class: ConfigClassLookup, errors: list[str]) -> Any:
    if isinstance(raw, StrictModel):
        return raw
    if not isinstance(raw, Mapping) or "name" not in raw:
        errors.append(f"{kind}: got {raw!r}, expected a mapping with a 'name', e.g. {kind}: {{name: …}}")
        return raw
    try:
        cls = config_class(kind, raw["name"])
        return cls.model_validate(dict(raw))
    except ValidationError as error:
        errors += _explain(error, config_class(kind, raw["name"]), prefix=f"{kind}.")
    except ValueError as error:
        errors.append(str(error))
    return raw


def _explain(error: ValidationError, cls: type[BaseModel], *, prefix: str) -> list[str]:
    """One line per mistake, in the user's terms."""
    lines = []
    for item in error.errors():
        path = (prefix + ".".join(str(part) for part in item["loc"])).rstrip(".")
        if item["type"] == "extra_forbidden":
            valid = _keys_at(cls, item["loc"][:-1])
            close = difflib.get_close_matches(str(item["loc"][-1]), valid, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            lines.append(f"unknown key '{path}': {hint}Valid here: {', '.join(valid)}")
        elif item["type"] == "missing":
            lines.append(f"'{path}' is missing: set it in the file or as {path}=…")
        else:
            at = f"{path}: " if path else ""
            got = "" if isinstance(item["input"], Mapping) else f" (got {item['input']!r})"
            lines.append(f"{at}{item['msg'].removeprefix('Value error, ')}{got}")
    return lines


def _keys_at(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = cls.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            cls = annotation
    return sorted(cls.model_fields)
