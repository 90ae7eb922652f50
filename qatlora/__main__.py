"""`python -m qatlora recipe=NAME [KEY=VALUE ...]`: compose the settings, run the pipeline.

Hydra composes `conf/config.yaml`, one file per group and the recipe; the result is checked against
`qatlora.config` before anything slow is imported. Whatever goes wrong on purpose (`QatloraError`,
a typo in a key, a full disk) ends in one paragraph on stderr and an exit code; the traceback is
shown only with QATLORA_TRACEBACK=1.
"""

import contextlib
import gc
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qatlora.config import RootConfig, to_dataclasses
from qatlora.config.rules import validate
from qatlora.errors import ConfigError, Interrupted, QatloraError, SweepFailed, closest
from qatlora.explained import explain
from qatlora.interrupts import handled, interrupt
from qatlora.paths import shipped
from qatlora.quiet import quiet_libraries
from qatlora.report.results_sweep import SweepResult
from qatlora.sweep import SweepFolder, gather, record_run

_TRACEBACK_VARIABLE = "QATLORA_TRACEBACK"
_INTERRUPTED = 128 + 2  # the shell's code for a process that SIGINT ended
_HYDRAS_FLAGS = (
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun",
    "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun",
    "--info", "-h", "-c", "-p", "-r", "-m", "-sc", "-cp", "-cn", "-cd", "-i",
)  # fmt: skip
"""It takes their beginnings, too."""

_HELP = """\
Usage: python -m qatlora recipe=NAME [GROUP=CHOICE ...] [KEY=VALUE ...]
       python -m qatlora -m recipe=NAME adapter.rank=8,16      (a sweep; several runs at a
                                        time with hydra/launcher=joblib|submitit_slurm|ray)

Recipes (recipe=NAME):
{recipes}

Groups (GROUP=CHOICE), each choice a file of conf/GROUP:
{groups}

Keys often set: base.path, data.path, adapter.path, adapter.rank, train.max_steps,
train.learning_rate, seed, run_dir. All of them with their values:
  python -m qatlora recipe=NAME --cfg job
Hydra's own flags: --hydra-help."""


def main() -> None:
    """Run one recipe, or a sweep of it; always ends in `SystemExit` when something failed."""
    quiet_libraries()
    arguments = [_expand_home(argument) for argument in sys.argv[1:]]
    sys.argv[1:] = arguments  # Hydra reads them there
    try:
        if {"-h", "--help"} & set(arguments):
            print(_help())
            return
        register_recipes(shipped("recipes"))
        _check_flags(arguments)
        _check_choices_are_named(arguments)
        _check_launcher_is_installed(arguments)
        _check_processes(arguments)
        with handled([signal.SIGTERM], interrupt):
            _run_hydra()
    except Interrupted as stop:
        _fail(str(stop), stop.exit_code)
    except KeyboardInterrupt:
        _fail("Interrupted; what was written before stays in the run folder.", _INTERRUPTED)
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        _fail(*explained)


def _expand_home(argument: str) -> str:
    """`base.path=~/model`: no shell expands it there, and Hydra's grammar refuses the tilde."""
    key, equals, value = argument.partition("=")
    return f"{key}={Path(value).expanduser()}" if equals and value.startswith("~/") else argument


def register_recipes(recipes: Path) -> None:
    """Make the schema and each file of `recipes` known to Hydra.

    Hydra looks for a group in a folder of the same name below conf/; the store is its other way.
    """
    store = ConfigStore.instance()
    store.store(name="root_schema", node=RootConfig)
    for path in sorted(recipes.glob("*.yaml")):
        node = OmegaConf.load(path)
        OmegaConf.update(node, "card.name", path.stem)
        store.store(group="recipe", name=path.stem, node=node, package="_global_")


def _check_flags(arguments: Sequence[str]) -> None:
    """Refuse `--key value` as other programs take it, which Hydra answers with its usage."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("-") and not any(known.startswith(flag) for known in _HYDRAS_FLAGS):
            raise ConfigError(
                f"{argument}: there is no such flag. A setting is given as KEY=VALUE, without "
                "dashes and with its section, as in train.max_steps=100; --help lists the common "
                "ones."
            )


def _check_choices_are_named(arguments: Sequence[str]) -> None:
    """Refuse a missing recipe and `GROUP=null`, which Hydra answers with a traceback."""
    for group, choices in {"recipe": _recipe_names(), **_group_choices()}.items():
        if f"{group}=null" in arguments:
            raise ConfigError(f"{group}=null: a run needs one; {closest('', choices)}")
    flags = {argument for argument in arguments if argument.startswith("-")}
    runs = flags <= {"-m", "--multirun", "-r", "--run"}
    if runs and not any(argument.startswith("recipe=") for argument in arguments):
        raise ConfigError(
            f"No recipe: a run needs recipe=NAME; {closest('', _recipe_names())} "
            "python -m qatlora --help says what each does."
        )


def _check_launcher_is_installed(arguments: Sequence[str]) -> None:
    """Refuse a launcher of ours whose package is absent, which Hydra answers with a traceback."""
    prefix = "hydra/launcher="
    for name in (one.removeprefix(prefix) for one in arguments if one.startswith(prefix)):
        path = shipped("conf") / "hydra" / "launcher" / f"{name}.yaml"
        if not path.is_file():
            continue  # Hydra's own, or none: Hydra names the choices
        plugin = ".".join(str(OmegaConf.load(path)["_target_"]).split(".")[:2])
        if importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(plugin):
            continue
        raise ConfigError(
            f"{prefix}{name} needs a package that is not installed. Add it with: "
            f"pip install 'qatlora[{name.partition('_')[0]}]'."
        )


def _check_processes(arguments: Sequence[str]) -> None:
    """Under torchrun, refuse a sweep; only the first process makes the run folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError(
            f"-m in {os.environ['WORLD_SIZE']} processes: a sweep's runs are of one process each. "
            "Use torchrun for a single run, or leave it out."
        )
    if os.environ.get("RANK") != "0":
        sys.argv.append("hydra.run.dir=.")  # the pipeline gets the first one's


def _run_hydra() -> None:
    """Let Hydra parse the command line and call the pipeline once, or once per job of a sweep."""
    # Hydra prints errors its own way unless told to let them through to main().
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: list[QatloraError | OSError] = []

    def task(cfg: DictConfig) -> None:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            _run_job(cfg)
            return
        try:
            _run_pipeline(cfg)
        except (QatloraError, OSError) as error:
            failures.append(error)  # raised by Hydra it would print a line of its own

    SweepFolder.current = None
    conf = str(shipped("conf"))
    try:
        hydra.main(version_base="1.3", config_path=conf, config_name="config")(task)()
    finally:  # an interrupted sweep has a table, too
        sweep = _end_sweep()
    if failures:
        raise failures[0]
    if sweep and sweep.num_failed:
        raise SweepFailed(
            f"{sweep.num_failed} of the {len(sweep.runs)} runs of the sweep failed; their reasons "
            f"stand above and in {sweep.folder}/sweep.md."
        )


def _run_job(cfg: DictConfig) -> None:
    """One run of a sweep, perhaps in a process of its own; it fails without stopping the others."""
    quiet_libraries()
    hydra_cfg = HydraConfig.get()
    number, overrides = hydra_cfg.job.num, list(hydra_cfg.overrides.task)

    def run() -> str | None:
        try:
            _run_pipeline(cfg)
        except Exception as error:
            explained = explain(error)
            if explained is None:
                traceback.print_exc()  # a bug
            reason = explained[0] if explained else f"{type(error).__name__}: {error}"
            name = hydra_cfg.job.override_dirname
            print(f"run {number} ({name}): {reason}", file=sys.stderr)
            return reason
        return None

    record_run(Path(hydra_cfg.runtime.output_dir), number, overrides, run)
    gc.collect()  # the next run may need the memory of this one's models


def _end_sweep() -> SweepResult | None:
    """Write and show the table of a sweep; None after a single run."""
    folder = SweepFolder.current
    sweep = gather(folder, SweepFolder.earlier) if folder else None
    if sweep is not None:
        from qatlora.report.sweep_table import show, write_sweep  # imports the plots

        write_sweep(sweep)
        show(sweep)
    return sweep


def _run_pipeline(cfg: DictConfig) -> None:
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    try:
        cfg.run_dir = str(output_dir)  # of a sweep: the job's own folder
        cfg.overrides = list(HydraConfig.get().overrides.task)
        settings = to_dataclasses(cfg)
        validate(settings)
    except ConfigError:
        with contextlib.suppress(OSError):
            output_dir.rmdir()  # Hydra makes it before it calls us; a typo should leave nothing
        raise
    if settings.stages == ["doctor"]:  # also where the pipeline cannot be imported
        from qatlora.doctor.run import run
    else:
        from qatlora.pipeline import run  # imports torch: only for a run that will take place
    run(settings)


def _fail(message: str, exit_code: int) -> None:
    if os.environ.get(_TRACEBACK_VARIABLE) == "1":
        traceback.print_exc()
    print(f"qatlora: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _recipe_names() -> list[str]:
    return [path.stem for path in sorted(shipped("recipes").glob("*.yaml"))]


def _group_choices() -> dict[str, list[str]]:
    """Our groups; conf/hydra/, where there is one, configures Hydra itself."""
    folders = sorted(folder for folder in shipped("conf").iterdir() if folder.is_dir())
    folders = [folder for folder in folders if folder.name != "hydra"]
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def _help() -> str:
    """The recipes with their purposes, the groups with their choices, and the common keys."""
    recipes = {name: _card_purpose(name) for name in _recipe_names()}
    groups = {group: ", ".join(choices) for group, choices in _group_choices().items()}
    return _HELP.format(recipes=_two_columns(recipes), groups=_two_columns(groups))


def _card_purpose(recipe: str) -> str:
    node = OmegaConf.load(shipped("recipes") / f"{recipe}.yaml")
    return str(OmegaConf.select(node, "card.purpose", default=""))


def _two_columns(rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())


if __name__ == "__main__":
    main()
