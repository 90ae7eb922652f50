"""The rules that a config's types cannot express, checked before any long work.

Each check raises `ConfigError` with the value found, the rule it breaks and the remedy.
"""

import math
import operator
import re
from pathlib import Path

from qatlora.config import (
    STAGES,
    AdapterKind,
    BaseConfig,
    Effect,
    ExportConfig,
    Latent,
    RootConfig,
    Rounding,
    Storage,
    TeacherKind,
    TrainConfig,
    Trained,
)
from qatlora.config.chat_rules import check_chat_source
from qatlora.config.recipe_rules import check_recipe_settings
from qatlora.config.teacher_rules import check_losses, check_teacher
from qatlora.errors import ConfigError, closest

_MINIMA = {
    "adapter.rank": 1,
    "data.max_length_tokens": 8,
    "data.eval_rows": 1,
    "data.eval_tokens": 1,
    "data.replay_rows_per_step": 0,
    "data.num_prompts": 0,
    "preview.num_examples": 0,
    "preview.max_conversations": 1,
    "train.max_steps": 1,
    "train.rows_per_step": 1,
    "train.micro_batch_rows": 1,
    "train.save_steps": 1,
    "train.eval_steps": 0,
    "train.eval_tokens": 2,
    "evaluate.tokens_per_chunk": 1,
    "evaluate.sample_max_new_tokens": 1,
    "build.max_new_tokens": 1,
    "guard.identity_max_differing_blocks": 0,
    "guard.effect_min_standard_errors": 0,
    "guard.roundtrip_kld_mean_max_nats": 0,
    "guard.roundtrip_kld_p99_max_nats": 0,
    "guard.roundtrip_same_top_min_share": 0,
    "guard.llama_cpp_windows": 1,
    "guard.llama_cpp_window_tokens": 8,
    "guard.llama_cpp_weights_kld_max_nats": 0,
    "guard.llama_cpp_kld_max_nats": 0,
    "guard.llama_cpp_teacher_kld_max_nats": 0,
    "logging.log_steps": 1,
    "seed": 0,
    "benchmark.rounds": 1,
    "benchmark.warmup_rounds": 0,
    "benchmark.max_steps": 1,
    "benchmark.rows_per_step": 1,
    "benchmark.extra_rates": 0,
    "benchmark.eval_tokens": 1,
    "validate.gguf_kld_max_nats": 0,
    "fidelity.tokens_per_text": 2,
    "fidelity.window_tokens": 8,
    "fidelity.worst_tokens": 0,
    "fidelity.llama_cpp_tokens": 100,  # llama-perplexity gives no statistics below
    "teacher.ce_weight": 0,
    "teacher.kl_weight": 0,
    "teacher.general_kl_weight": 0,
    "teacher.cache_top_k": 1,
    "train.warmup_ratio": 0,
    "train.weight_decay": 0,
}
_POSITIVE = (
    "adapter.alpha",
    "teacher.temperature",
    "train.learning_rate",
    "train.steps_learning_rate",
    "train.max_grad_norm",
    "build.max_shard_gb",
    "benchmark.steps_rate_factor",
    "plan.gpu_gb",
)


def validate(cfg: RootConfig) -> None:
    """Check the rules that types cannot express, before any long work.

    Raises:
        ConfigError: A value breaks a rule; the message names value, rule and remedy.
    """
    _check_stages(cfg.stages)
    _check_numbers(cfg)
    _check_base(cfg.base)
    _check_adapter(cfg)
    _check_data(cfg)
    check_losses(cfg)
    check_teacher(cfg)
    _check_distill(cfg)
    _check_train(cfg.train)
    _check_logging(cfg)
    _check_export(cfg.export)
    check_recipe_settings(cfg)


def _check_stages(stages: list[str]) -> None:
    if not stages:
        raise ConfigError(
            "stages is empty: a run is made of the stages that its recipe lists. "
            "Choose one with recipe=NAME; --help lists the recipes."
        )
    for stage in stages:
        if stage not in STAGES:
            raise ConfigError(f"stages: {stage!r} is no stage; {closest(stage, STAGES)}")
    if stages != [stage for stage in STAGES if stage in stages]:
        raise ConfigError(
            f"stages={stages}: stages run once each and only in the order {', '.join(STAGES)}. "
            "Reorder the list in the recipe."
        )
    if "doctor" in stages and len(stages) > 1:
        raise ConfigError(
            f"stages={stages}: the doctor also looks at machines where no other stage can run, so "
            "it runs alone. Use recipe=doctor as it is."
        )
    if "publish" in stages and not {"write_candidate", "guard"} <= set(stages):
        raise ConfigError(
            f"stages={stages}: publish needs a candidate that has passed the guard. "
            "Add write_candidate and guard before it."
        )


def _check_numbers(cfg: RootConfig) -> None:
    for key, minimum in _MINIMA.items():
        value = operator.attrgetter(key)(cfg)
        if not (math.isfinite(value) and value >= minimum):
            raise ConfigError(f"{key}={value}: must be at least {minimum}. Set {key} higher.")
    for key in _POSITIVE:
        value = operator.attrgetter(key)(cfg)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{key}={value}: must be greater than 0. Set {key} higher.")


def _check_base(base: BaseConfig) -> None:
    if base.path and base.hub_id:
        raise ConfigError(
            f"base.path={base.path} and base.hub_id={base.hub_id}: a run has one base. "
            "Give only one of the two keys."
        )
    if not (base.path or base.hub_id or base.embedded or base.architecture):
        raise ConfigError(
            "base.path is empty: a run needs a base. Give base.path=FOLDER (a Hugging Face "
            "checkpoint) or base.path=FILE.gguf, or an embedded one, base=gemma3_270m."
        )
    if base.path and not Path(base.path).exists():
        raise ConfigError(
            f"base.path={base.path}: no such file or folder. Give the folder of a Hugging Face "
            "checkpoint or a GGUF file."
        )
    for pattern in base.trained or []:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"base.trained: {pattern!r} is no regular expression ({error}). Correct it, or "
                "leave base.trained=null for the architecture's own list."
            ) from error


def _check_adapter(cfg: RootConfig) -> None:
    adapter = cfg.adapter
    if adapter.rounding is Rounding.reference and adapter.kind is not AdapterKind.lora:
        raise ConfigError(
            f"adapter.rounding=reference with adapter.kind={adapter.kind.name}: llama.cpp's rule "
            "chooses the steps itself, so nothing may train them. Use adapter=lora, or "
            "adapter.rounding=frozen."
        )
    if adapter.steps_rank is not None and adapter.steps_rank < 1:
        raise ConfigError(
            f"adapter.steps_rank={adapter.steps_rank}: must be at least 1. Raise it, or give "
            "null for the same rank as adapter.rank."
        )
    if adapter.path is None and "write_candidate" in cfg.stages and "train" not in cfg.stages:
        raise ConfigError(
            "adapter.path is empty: this recipe exports a saved adapter and trains none. "
            "Give adapter.path=RUN_FOLDER/adapter."
        )
    if adapter.path is not None:
        config_file = Path(adapter.path) / "adapter_config.json"
        if not config_file.is_file():
            raise ConfigError(
                f"adapter.path={adapter.path}: there is no {config_file.name} in it. "
                "Give the adapter folder of a finished run."
            )


def _check_data(cfg: RootConfig) -> None:
    data = cfg.data
    check_chat_source(data)
    for name, weight in data.replay_mix.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"data.replay_mix.{name}={weight}: must be greater than 0. Raise it, or remove the "
                f"text with ~data.replay_mix.{name}."
            )
    if cfg.teacher.general_kl_weight > 0 and data.replay_rows_per_step == 0:
        raise ConfigError(
            f"data.replay_rows_per_step=0 with teacher.general_kl_weight="
            f"{cfg.teacher.general_kl_weight}: that term is computed on replayed rows. Raise "
            "data.replay_rows_per_step, or set teacher.general_kl_weight=0."
        )


def _check_distill(cfg: RootConfig) -> None:
    if cfg.guard.effect is Effect.teacher_kld and cfg.teacher.kind is TeacherKind.none:
        raise ConfigError(
            "guard.effect=teacher_kld with teacher.kind=none: there would be no KLD to fall. Use "
            "teacher=bf16, or guard.effect=task_loss."
        )
    if cfg.distill.train is not Trained.weights:
        if cfg.distill.latent is not Latent.fp32:
            raise ConfigError(
                f"distill.latent={cfg.distill.latent.name} with distill.train=adapters: only "
                "trained weights are held so, factors stay float32. Use distill.train=weights, or "
                "leave distill.latent out."
            )
        return
    if cfg.storage.kind is not Storage.bf16:
        raise ConfigError(
            f"distill.train=weights with storage={cfg.storage.kind.name}: trained weights start "
            "from the checkpoint's own values, which only bf16 keeps. Use storage=bf16."
        )
    if "save_adapter" in cfg.stages or cfg.adapter.path is not None:
        raise ConfigError(
            "distill.train=weights with adapter.path or the stage save_adapter: trained weights "
            "leave a checkpoint, no adapter. Use recipe=qat_distill without adapter.path, or "
            "distill.train=adapters."
        )


def _check_train(train: TrainConfig) -> None:
    if train.rows_per_step % train.micro_batch_rows:
        raise ConfigError(
            f"train.micro_batch_rows={train.micro_batch_rows}: must divide train.rows_per_step="
            f"{train.rows_per_step}. Change one of the two."
        )
    if train.warmup_ratio >= 1:
        raise ConfigError(
            f"train.warmup_ratio={train.warmup_ratio}: a share of train.max_steps, below 1. "
            "Set it lower."
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", train.device):
        raise ConfigError(f"train.device={train.device}: must be auto, cpu, cuda or cuda:N.")


def _check_logging(cfg: RootConfig) -> None:
    log_steps, max_steps = cfg.logging.log_steps, cfg.train.max_steps
    if "train" in cfg.stages and log_steps > max_steps:
        raise ConfigError(
            f"logging.log_steps={log_steps}: no loss would be logged, as training ends after "
            f"train.max_steps={max_steps}. Set logging.log_steps to at most that."
        )


def _check_export(export: ExportConfig) -> None:
    name = export.file_name
    if name is not None and (Path(name).name != name or not name.endswith(".gguf")):
        raise ConfigError(
            f"export.file_name={name}: a file name inside the run folder that ends in .gguf. "
            "Give a plain name; the folder is set by run_dir."
        )
