"""What a learner of coefficients is, and how it is chosen by name with its options checked.

A learner is one file in `learned/` that holds

- ``learn(problem, descent, *, option=default, ...)``: the coefficients. It mounts the problem's adapters itself;
- optionally ``DEFAULTS``, options of `Descent` that start elsewhere here; ``USES``, those that have a meaning here, all
  where it is missing; ``ALIASES``, other names of its own options; ``NEEDS_LABELS = False`` where the rows' labels are
  never looked at; ``FILTERS``, option -> the transform that the updates are to go through where it is set.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from lorica import plugins
from lorica.errors import UnknownNameError
from lorica.merging.fitting import options
from lorica.merging.fitting.descent import Learned
from lorica.merging.fitting.options import Descent
from lorica.merging.fitting.problem import Problem
from lorica.plugins import Catalogue, checked_options

LEARNERS = Catalogue("lorica.merging.learned", "coefficient optimizer")


@dataclass(frozen=True)
class Learner:
    """A learner with its options settled."""

    name: str
    learn: Callable[..., Learned]
    options: Mapping[str, Any]  # the learner's own
    descent: Descent
    needs_labels: bool = True
    filters: str | None = None  # what the updates are to be filtered by before they are handed in

    def __call__(self, problem: Problem) -> Learned:
        """The problem's coefficients. Raises UnknownNameError for a task of sampling.per_task that it does not have."""
        names = [task.name for task in problem.tasks]
        for name in self.descent.sampling.per_task:
            if name not in names:
                raise UnknownNameError(plugins.unknown("task of sampling.per_task", name, names))
        return self.learn(problem, self.descent, **self.options)


def load(name: str, params: Mapping[str, Any], *, seed: int = 0) -> Learner:
    """The learner called `name`, `params` shared out to its own options and those of Descent.

    `seed` is the one where `params` has none. Raises UnknownNameError for a name or option that is not known here,
    ConfigError for a value out of bounds.
    """
    get: partial[Any] = partial(LEARNERS.load, name)
    known, learn = name.lower().replace("-", "_"), get("learn")
    owner = f"optimizer {known}"
    uses: Collection[str] = get("USES", default=[each.name for each in fields(Descent)])
    aliases = {word: meant for word, meant in options.ALIASES.items() if meant[0] in uses}
    own_aliases = get("ALIASES", default={})
    own_words = [*dict(LEARNERS.options(known, "learn")), *own_aliases]
    stranger = next(
        (word for word in params if word not in own_words and word not in uses and word not in aliases), None
    )
    if stranger is not None:
        raise UnknownNameError(plugins.unknown(f"option of {owner}", stranger, [*own_words, *uses, *aliases]))
    own = {word: value for word, value in params.items() if word in own_words}
    shared = {word: value for word, value in params.items() if word not in own_words}
    given = {aliases.get(word, (word,))[0] for word in shared}
    defaults = {"seed": seed, **get("DEFAULTS", default={})}
    shared |= {option: value for option, value in defaults.items() if option not in given and option in uses}
    checked = checked_options(owner, learn, own, own_aliases)
    return Learner(
        name=known,
        learn=learn,
        options=checked,
        descent=Descent(**checked_options(owner, Descent, shared, aliases)),
        needs_labels=get("NEEDS_LABELS", default=True),
        filters=next((way for option, way in get("FILTERS", default={}).items() if checked[option]), None),
    )
