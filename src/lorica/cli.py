"""The command line. Every verb reads its words into a config and calls one function of `runs`.

Nothing heavy is imported until a verb needs it, so that help and lists answer at once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lorica import __version__
from lorica.errors import ConfigError, LoricaError

if TYPE_CHECKING:
    from lorica.config import AblateConfig, CompareConfig
    from lorica.runs import MergedRun, Trained

app = typer.Typer(
    name="lorica",
    help="Train, boost, merge and evaluate LoRA adapters.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
mezo_app = typer.Typer(name="lorica-mezo", add_completion=False, pretty_exceptions_enable=False)
WORDS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
OUT = Console(quiet=os.environ.get("RANK", "0") != "0")  # of the processes that torchrun starts, the first speaks
ERR = Console(stderr=True)


def main() -> None:
    """Run the command line."""
    _run(app)


def mezo() -> None:
    """Run `lorica-mezo`."""
    _run(mezo_app)


def _run(commands: typer.Typer) -> None:
    """A user's mistake is one line on stderr and exit code 2, never a traceback."""
    warnings.simplefilter("default")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        commands()
    except LoricaError as error:
        ERR.print(f"[bold red]error:[/] {_escaped(' '.join(str(error).split()))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        ERR.print("interrupted")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _lorica(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        OUT.print(__version__, highlight=False)


@app.command(context_settings=WORDS)
def train(context: typer.Context) -> None:
    """Train an adapter: lorica train FILE.yaml key=value --flag VALUE, each as often as needed, or none.

    Examples: lorica train model=demo task.path=demo_out/data/sentiment · lorica train run.yaml learning_rate=1e-4
    adapter.rank=8 · lorica train --model_name facebook/opt-350m --task_name SST2 --lora --lora_r 8 --trainer zo
    """
    with _imports():
        from lorica import config, runs

    trained = runs.train(config.read(config.TrainConfig, _of_mode("single", context.args)), ERR)
    _print_trained(trained)


@mezo_app.command(context_settings=WORDS)
def from_environment(context: typer.Context) -> None:
    """Train as MeZO's mezo.sh does: MODE=lora TASK=SST2 MODEL=M lorica-mezo key=value --flag VALUE.

    Reads MODE (ft, prefix, lora, xgblora), TASK, MODEL, BS, LR, EPS, SEED, TRAIN, DEV, EVAL, STEPS, EVAL_STEPS and
    XGBLORA_STEPS from the environment; the words behind it are those of `lorica train`, and win.
    """
    with _imports():
        from lorica import config, runs

    beneath = config.mezo.tree_of(os.environ)
    _print_trained(runs.train(config.read(config.TrainConfig, context.args, beneath), ERR))


def _print_trained(trained: Trained) -> None:
    from lorica import tables

    OUT.print(tables.evaluations([(trained.run.path.name, trained.evaluation)]))
    OUT.print(str(trained.run.path), highlight=False, soft_wrap=True)


@app.command(context_settings=WORDS)
def evaluate(context: typer.Context) -> None:
    """Evaluate runs, adapters, merges or models: lorica evaluate RUN ADAPTER MODEL --tasks a b c key=value.

    One target without --tasks is evaluated on its own task, or on task=T; model=M task=T alone is the base model.
    Several are a matrix, on the tasks that are named or on the runs' own; a task is read from task.path=FOLDER/{task}.
    """
    with _imports():
        from lorica import config, runs, tables

    targets, words = config.targets_apart(config.EvaluateConfig, context.args)
    beneath = {"targets": targets} if targets else {}
    given = config.read(config.EvaluateConfig, words, beneath)
    if given.is_matrix:
        done = runs.evaluate_matrix(given, ERR)
        for line in tables.matrix(done, OUT.width):
            OUT.print(line, highlight=False, soft_wrap=isinstance(line, str))
        OUT.print(str(done.folder), highlight=False, markup=False, soft_wrap=True)
        return
    target = given.targets[0] if given.targets else None
    OUT.print(tables.evaluations([(target or "base", runs.evaluate_target(target, given))]))


@app.command(context_settings=WORDS)
def replay(context: typer.Context) -> None:
    """Rebuild a zeroth-order run from its base model and its log alone: lorica replay RUN output_dir=DIR.

    Exit code 0 if the result is the run's own, bit for bit; 1 if it differs, with the first steps that do.
    """
    with _imports():
        from lorica import config, runs

    targets, words = config.targets_apart(config.ReplayConfig, context.args)
    if len(targets) != 1:
        raise ConfigError(f"replay takes one run, and was given {len(targets)}: lorica replay RUN output_dir=DIR")
    done = runs.replay(targets[0], config.read(config.ReplayConfig, words))
    for remark in done.remarks:
        ERR.print(f"warning: {remark}", highlight=False, markup=False, soft_wrap=True)
    OUT.print(done.told(), highlight=False, soft_wrap=True)
    if done.folder is not None:
        OUT.print(str(done.folder), highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(0 if done.is_identical else 1)


@app.command(context_settings=WORDS)
def export(context: typer.Context) -> None:
    """Write a run's adapter for other programs: lorica export RUN output_dir=DIR rank=8 profile=portable fuse=true."""
    with _imports():
        from lorica import config, runs

    targets, words = config.targets_apart(config.ExportConfig, context.args)
    if len(targets) != 1:
        raise ConfigError(f"export takes one run, and was given {len(targets)}: lorica export RUN output_dir=DIR")
    done = runs.export(targets[0], config.read(config.ExportConfig, words))
    OUT.print(done.told(), highlight=False)
    OUT.print(str(done.folder), highlight=False, soft_wrap=True)


@app.command(context_settings=WORDS)
def merge(context: typer.Context) -> None:
    """Merge adapters into one: lorica merge --adapters A B --method ties rank=16 output_dir=OUT, or FILE.yaml.

    With --plan: what it would read, hold, take and lose. With --diagnose: how the adapters relate, and which methods
    suit. lorica merge --audit OUT A B: how far an adapter merged by another tool is from the exact merge.
    """
    with _imports():
        from lorica import config, runs, tables

    words = list(context.args)
    if "--audit" in words:
        words.remove("--audit")
        targets, words = config.targets_apart(config.MergeConfig, words)
        cfg = config.read(config.MergeConfig, [*words, "--adapters", *targets[1:]])
        OUT.print(tables.merge_audit(runs.audit_merge(targets, cfg)))
        return
    asked = [word for word in ("--plan", "--diagnose") if word in words]
    targets, words = config.targets_apart(config.MergeConfig, [word for word in words if word not in asked])
    if targets:
        raise ConfigError(f"{' '.join(targets)}: adapters stand behind --adapters: lorica merge --adapters A B")
    cfg = config.read(config.MergeConfig, words)
    if "--plan" in asked:
        OUT.print(tables.merge_plan(runs.plan_merge(cfg)))
    if "--diagnose" in asked:
        OUT.print(tables.merge_diagnosis(runs.diagnose_merge(cfg)))
    if not asked:
        _print_merge(runs.merge(cfg, ERR))


@app.command(name="evaluate-merged", context_settings=WORDS)
def evaluate_merged(context: typer.Context) -> None:
    """Merge and evaluate without saving weights: lorica evaluate-merged FILE.yaml --eval-tasks a b --split test."""
    with _imports():
        from lorica import config, runs

    cfg = config.read(config.MergeConfig, [*context.args, "save_merged=false"])
    _print_merge(runs.merge(cfg.model_copy(update={"eval_tasks": cfg.eval_tasks or ["all"]}), ERR))


def _print_merge(done: MergedRun) -> None:
    from lorica import tables

    for line in tables.merged(done):
        OUT.print(line, highlight=False, soft_wrap=isinstance(line, str))
    OUT.print(str(done.folder), highlight=False, soft_wrap=True)


@app.command(name="merge-sweep", context_settings=WORDS, help="The same as sweep.")
@app.command(context_settings=WORDS)
def sweep(context: typer.Context) -> None:
    """Choose a merge's parameters: lorica sweep FILE.yaml --search-type grid --grid '{"lambda": [0, 0.5, 1]}'.

    Every point is judged on dev by what the merge keeps of each task; the winner is saved, and evaluated once on test.
    lorica sweep resume=FOLDER goes on after a crash. lorica sweep --task T --mode sweep: the rate of LoRA on a task.
    """
    with _imports():
        from lorica import config, runs, tables

    words = _of_mode("sweep", context.args)
    if words != context.args:
        _study(config.read(config.CompareConfig, words, config.LEARNING_RATE_SEARCH))
        return
    done = runs.sweep(config.read(config.SweepConfig, context.args), ERR)
    for line in tables.sweep(done.summary):
        OUT.print(line, highlight=False, soft_wrap=isinstance(line, str))
    OUT.print(str(done.folder), highlight=False, markup=False, soft_wrap=True)


@app.command(context_settings=WORDS)
def inspect(context: typer.Context) -> None:
    """Say what adapters are made of: lorica inspect RUN_OR_ADAPTER ... --all energy_at=4 output_dir=DIR.

    Trainable share, norms, singular values and ranks, booster by booster; of several, how they lie to each other.
    """
    with _imports():
        from lorica import config, runs, tables

    targets, words = config.targets_apart(config.InspectConfig, context.args)
    given = config.read(config.InspectConfig, words)
    found = runs.inspect(targets, given)
    for line in tables.inspection(found, energy_at=given.energy_at, every_module=given.all):
        OUT.print(line, highlight=False, soft_wrap=isinstance(line, str))
    if found.folder is not None:
        OUT.print(str(found.folder), highlight=False, markup=False, soft_wrap=True)


@app.command(context_settings=WORDS)
def compare(context: typer.Context) -> None:
    """Compare ways to train: lorica compare --arms lora full --tasks a b --seeds 0 1 2 max_steps=1000 model=M.

    Every arm's learning rate is chosen on dev from one grid; differences are paired, with intervals, and told in words.
    The same line again, or lorica compare resume=FOLDER, runs only what is missing. With --plan: what it would take.
    """
    with _imports():
        from lorica import config

    _study(config.read(config.CompareConfig, context.args))


@app.command(context_settings=WORDS)
def ablate(context: typer.Context) -> None:
    """Vary one thing: lorica ablate --type rank|alpha|modules task=T model=M, or --grid '{"adapter.rank": [4, 8]}'.

    With --plan: what it would take, and nothing runs.
    """
    with _imports():
        from lorica import config

    _study(config.read(config.AblateConfig, _of_mode("ablation", context.args)))


def _study(given: CompareConfig | AblateConfig) -> None:
    """A study run, or told of with `plan`."""
    with _imports():
        from lorica import runs, tables

    if given.plan:
        for line in tables.study_plan(runs.plan_study(given)):
            OUT.print(line, highlight=False, soft_wrap=isinstance(line, str))
        return
    done = runs.study(given, ERR)
    for line in tables.study(done.outcome):
        OUT.print(line, highlight=False, soft_wrap=isinstance(line, str))
    OUT.print(str(done.folder), highlight=False, markup=False, soft_wrap=True)
    failed = [each for each in done.outcome["runs"] if each["role"] == "final" and each["state"] != "finished"]
    raise typer.Exit(1 if failed or not done.outcome["finished"] else 0)


@app.command(context_settings=WORDS)
def verify(context: typer.Context) -> None:
    """Check an adapter on its base: lorica verify RUN_OR_ADAPTER --model M --speed; alone, one trained on the spot.

    Exit code 0 if every check passed or was skipped with its reason, 1 if one failed.
    """
    with _imports():
        from lorica import config, runs, tables
        from lorica.demo import proof

    targets, words = config.targets_apart(config.VerifyConfig, context.args)
    if len(targets) > 1:
        raise ConfigError(f"verify takes one run or adapter, and was given {len(targets)}: lorica verify RUN")
    given = config.read(config.VerifyConfig, words)
    found = runs.verify(targets[0], given, ERR) if targets else proof.prove(given, ERR)
    for line in tables.verification(found):
        OUT.print(line, highlight=False, soft_wrap=isinstance(line, str))
    raise typer.Exit(0 if found.passed else 1)


@app.command(context_settings=WORDS)
def report(context: typer.Context) -> None:
    """Show finished work as one page: lorica report RUN STUDY SWEEP MERGE MATRIX ... output_dir=DIR.

    Names folders that other commands left, or one that holds them; the page needs neither a network nor a server.
    """
    with _imports():
        from lorica import config, runs

    targets, words = config.targets_apart(config.ReportConfig, context.args)
    page = runs.report(targets, config.read(config.ReportConfig, words))
    OUT.print(str(page), highlight=False, markup=False, soft_wrap=True)


@app.command(context_settings=WORDS)
def plan(context: typer.Context) -> None:
    """Say what training would need, without loading weights: lorica plan model=M adapter.rank=8 length=128."""
    with _imports():
        from lorica import config, runs, tables

    OUT.print(tables.plan(runs.plan(config.read(config.PlanConfig, context.args))))


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="tasks, methods, transforms, optimizers, flags or keys")] = "tasks",
) -> None:
    """List what lorica knows by name: tasks, merge methods, transforms, optimizers, older tools' flags, config keys."""
    with _imports():
        from lorica import tables

    OUT.print(tables.listing(what))


@app.command(context_settings=WORDS)
def demo(context: typer.Context) -> None:
    """Train on the embedded model and tasks, compare, and leave an output folder: lorica demo output_dir=DIR."""
    with _imports():
        from lorica.demo import command

    command.run(context.args, OUT, ERR)


@contextlib.contextmanager
def _imports() -> Iterator[None]:
    """Import without the garbage collector: it would look again and again at what stays for as long as the command."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _of_mode(mode: str, words: list[str]) -> list[str]:
    """The words without `--mode`, by which an older tool told its verbs apart. Raises ConfigError for another mode."""
    if "--mode" not in words:
        return words
    at = words.index("--mode")
    given = words[at + 1] if at + 1 < len(words) else ""
    if given != mode:
        verb = {"single": "train", "sweep": "sweep", "ablation": "ablate"}.get(given)
        raise ConfigError(f"--mode {given} is " + (f"lorica {verb}" if verb else "none of single, sweep, ablation"))
    return [*words[:at], *words[at + 2 :]]


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    main()
