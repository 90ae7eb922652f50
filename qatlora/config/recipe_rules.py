"""The rules of settings that belong to one recipe each."""

import math
from pathlib import Path

from qatlora.config import (
    FidelityConfig,
    InspectConfig,
    PatchConfig,
    PlanConfig,
    RootConfig,
    ValidateConfig,
)
from qatlora.errors import ConfigError
from qatlora.model_spec import parse_models, parse_vanilla


def check_recipe_settings(cfg: RootConfig) -> None:
    """Check the settings of the recipes whose stages the run has.

    Raises:
        ConfigError: with key, rule and remedy.
    """
    _check_inspect(cfg.inspect)
    _check_plan(cfg.plan)
    if "benchmark" in cfg.stages:
        _check_benchmark(cfg)
    if "validate" in cfg.stages:
        _check_validate(cfg.validate)
    if "apply_patch" in cfg.stages:
        _check_patch(cfg.patch)
    if "fidelity" in cfg.stages:
        _check_fidelity(cfg.fidelity)


def _check_inspect(inspect: InspectConfig) -> None:
    if inspect.against is not None and not Path(inspect.against).is_dir():
        raise ConfigError(
            f"inspect.against={inspect.against}: no such folder. Give the Hugging Face folder of "
            "the checkpoint before the edit, with config.json and safetensors files."
        )


def _check_validate(settings: ValidateConfig) -> None:
    if settings.merged is not None and settings.adapter is not None:
        raise ConfigError(
            f"validate.merged={settings.merged} and validate.adapter={settings.adapter}: one merge "
            "is judged at a time. Give only one of the two keys."
        )
    given = {key: getattr(settings, key) for key in ("merged", "adapter", "gguf")}
    if not any(given.values()):
        raise ConfigError(
            "validate.merged, validate.adapter and validate.gguf are empty: there is nothing to "
            "judge. Give validate.merged=FOLDER, validate.adapter=FOLDER or validate.gguf=FILE, "
            "and base.path of the checkpoint that it was made from."
        )
    for key, path in given.items():
        found = path is None or (Path(path).is_file() if key == "gguf" else Path(path).is_dir())
        if not found:
            kind = "file" if key == "gguf" else "folder"
            raise ConfigError(f"validate.{key}={path}: there is no such {kind}. Give its path.")


def _check_patch(patch: PatchConfig) -> None:
    for key in ("path", "base"):
        path = getattr(patch, key)
        if path is None or not Path(path).is_file():
            found = (
                f"patch.{key}={path}: there is no such file" if path else f"patch.{key} is empty"
            )
            raise ConfigError(
                f"{found}. Give patch.path=FILE.patch.safetensors and patch.base=BASE.gguf, as an "
                "export with export.patch=true wrote them."
            )


def _check_plan(plan: PlanConfig) -> None:
    for key in ("gpu_sizes_gb", "row_lengths_tokens"):
        values = getattr(plan, key)
        if not values or not all(math.isfinite(value) and value > 0 for value in values):
            raise ConfigError(
                f"plan.{key}={values}: must be a list of numbers above 0, at least one. Set "
                f"plan.{key} to such a list."
            )


def _check_benchmark(cfg: RootConfig) -> None:
    settings = cfg.benchmark
    lists = ("tokens_per_step", "learning_rates", "seeds")
    for key in lists:
        values = getattr(settings, key)
        if not values or len(set(values)) < len(values):
            raise ConfigError(
                f"benchmark.{key}={values}: must be a list of different values, at least one. Set "
                f"benchmark.{key} to such a list."
            )
    for rate in settings.learning_rates:
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(
                f"benchmark.learning_rates={settings.learning_rates}: each must be greater than 0. "
                "Set them higher."
            )
    if min(settings.seeds) < 0:
        raise ConfigError(f"benchmark.seeds={settings.seeds}: must be at least 0. Set them higher.")
    for num_tokens in settings.tokens_per_step:
        if num_tokens < 1 or num_tokens % cfg.data.max_length_tokens:
            raise ConfigError(
                f"benchmark.tokens_per_step={settings.tokens_per_step}: each must be a multiple of "
                f"data.max_length_tokens={cfg.data.max_length_tokens}, the length of a row. Change "
                "one of the two."
            )


def _check_fidelity(fidelity: FidelityConfig) -> None:
    parse_models("fidelity.models", fidelity.models)
    if fidelity.reference is not None:
        parse_models("fidelity.reference", [fidelity.reference])
    if fidelity.vanilla is not None:
        parse_vanilla(fidelity.vanilla)
    if not fidelity.texts or len(set(fidelity.texts)) < len(fidelity.texts):
        raise ConfigError(
            f"fidelity.texts={fidelity.texts}: must be a list of different texts, at least one. "
            "Set fidelity.texts to such a list, as [wiki,c4,chats]."
        )
