"""The rules of `teacher.*`: which losses can be computed, and who can be the teacher."""

from qatlora.config import RootConfig, Storage, TeacherKind, Trained
from qatlora.errors import ConfigError


def check_losses(cfg: RootConfig) -> None:
    """A term of the loss has what it needs, and there is one.

    Raises:
        ConfigError: KL without a teacher, or no term at all.
    """
    teacher = cfg.teacher
    kl_weight = max(teacher.kl_weight, teacher.general_kl_weight)
    if teacher.kind is TeacherKind.none and kl_weight > 0:
        raise ConfigError(
            f"teacher.kind=none with teacher.kl_weight={teacher.kl_weight} and "
            f"teacher.general_kl_weight={teacher.general_kl_weight}: both terms need a teacher. "
            "Set both to 0, or choose a teacher: teacher=bf16, self or cache."
        )
    if "train" in cfg.stages and max(kl_weight, teacher.ce_weight) == 0:
        raise ConfigError(
            "teacher.ce_weight, kl_weight and general_kl_weight are all 0: nothing would be "
            "trained. Set at least one of them above 0."
        )


def check_teacher(cfg: RootConfig) -> None:
    """The teacher fits the stages, the storage and what is trained.

    Raises:
        ConfigError: it does not.
    """
    teacher = cfg.teacher
    if not 0 < teacher.beta < 1:
        raise ConfigError(
            f"teacher.beta={teacher.beta}: the teacher's share of the mixture must be between 0 "
            "and 1. For the limits use teacher.divergence=forward_kl or reverse_kl."
        )
    if "teacher_cache" in cfg.stages and teacher.kind is not TeacherKind.bf16:
        raise ConfigError(
            f"teacher.kind={teacher.kind.name} with the stage teacher_cache: a cache is written by "
            "a bf16 checkpoint. Use teacher=bf16, with teacher.path=FOLDER for another one than "
            "the base."
        )
    if teacher.kind is TeacherKind.cache and teacher.path is None:
        raise ConfigError(
            "teacher.kind=cache without teacher.path: a cache is read from a folder that "
            "recipe=teacher_cache has written. Give teacher.path=FOLDER."
        )
    if teacher.kind is TeacherKind.self:
        _check_self_teacher(cfg)


def _check_self_teacher(cfg: RootConfig) -> None:
    if cfg.teacher.path is not None:
        raise ConfigError(
            f"teacher.path={cfg.teacher.path} with teacher.kind=self: the teacher is the base "
            "itself. Leave teacher.path out, or use teacher=bf16."
        )
    if cfg.storage.kind is Storage.nf4:
        raise ConfigError(
            "teacher.kind=self with storage=nf4: NF4 has rounded the checkpoint's weights, so the "
            "base in memory is no bf16 teacher. Use storage=bf16, storage=q4_0 with a base on the "
            "grid, or teacher=bf16 or cache."
        )
    if cfg.distill.train is Trained.weights:
        raise ConfigError(
            "teacher.kind=self with distill.train=weights: the checkpoint's weights are what is "
            "trained, so nothing of the teacher would stay. Use teacher=bf16 or cache."
        )
