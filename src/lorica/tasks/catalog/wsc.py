"""WSC: does a pronoun refer to a name? (Levesque et al. 2012; prompt of MeZO.)"""

from collections.abc import Mapping

from lorica.tasks.base import Hub, Prompt, TaskSpec


def with_pronoun(fields: Mapping[str, str]) -> Mapping[str, str]:
    """Adds {pronoun}: the second span in small letters."""
    return {**fields, "pronoun": fields["span2"].lower()}


TASK = TaskSpec(
    labels=("no", "yes"),
    texts=("text", "span1", "span2"),
    prompts={
        "default": Prompt(
            '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {span1}? Yes or No?\n',
            {"no": "No", "yes": "Yes"},
        )
    },
    hub=Hub(
        "aps/super_glue", "wsc.fixed", columns={"span1": "span1_text", "span2": "span2_text"}, labels=("no", "yes")
    ),
    prepare=with_pronoun,
)
