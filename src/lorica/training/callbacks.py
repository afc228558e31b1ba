"""What happens beside the loop: lines written, progress shown, the dev split looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict

from rich.console import Console

from lorica.evaluation.evaluate import Evaluation
from lorica.progress import bar
from lorica.training.fit import Step
from lorica.training.json_lines import JsonLines

Watch = Callable[[Step], None]


def write_steps(path: JsonLines) -> Watch:
    """Every step as a line of `training_loss.jsonl`."""

    def call(step: Step) -> None:
        line = asdict(step)
        del line["weights"]
        path.log(line)

    return call


def tell_evaluation(step: Step, found: Evaluation, path: JsonLines, say: Console) -> None:
    """An evaluation during training, as a line of `eval_loss.jsonl` and a line for the person."""
    values = {name: score.value for name, score in found.metrics.items()}
    path.log({"step": step.step, "forwards": step.forwards, "split": found.split, "loss": found.loss, **values})
    figures = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
    say.print(f"step {step.step}  {found.split} loss {found.loss:.4f}  {figures}", highlight=False)


@contextlib.contextmanager
def shown(num_steps: int, logging_steps: int, say: Console) -> Iterator[Watch]:
    """A progress bar on a terminal; otherwise a plain line every `logging_steps` steps."""
    with bar() as progress:
        task = progress.add_task("training", total=num_steps, note="")

        def call(step: Step) -> None:
            note = f"loss {step.loss:.4f}  lr {step.learning_rate:.2e}" + ("" if step.applied else "  not applied")
            progress.update(task, completed=step.step, note=note)
            if progress.disable and (step.step % logging_steps == 0 or step.step == num_steps):
                say.print(f"step {step.step}/{num_steps}  {note}  {step.seconds:.1f} s", highlight=False)

        yield call
