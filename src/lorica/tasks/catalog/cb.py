"""CB: does the premise entail, contradict or leave open the hypothesis? (De Marneffe et al. 2019; prompt of MeZO.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

TASK = TaskSpec(
    labels=("entailment", "contradiction", "neutral"),
    texts=("a", "b"),
    prompts={
        "default": Prompt(
            'Suppose {a} Can we infer that "{b}"? Yes, No, or Maybe?\n',
            {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
        )
    },
    hub=Hub("aps/super_glue", "cb", columns={"a": "premise", "b": "hypothesis"}),
)
