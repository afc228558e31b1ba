"""WiC: does a word mean the same in two sentences? (Pilehvar and Camacho-Collados 2019; prompt of MeZO.)"""

from lorica.tasks.base import Hub, Prompt, TaskSpec

TASK = TaskSpec(
    labels=("different", "same"),
    texts=("word", "sentence1", "sentence2"),
    prompts={
        "default": Prompt(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
            {"different": "No", "same": "Yes"},
        )
    },
    hub=Hub("aps/super_glue", "wic", labels=("different", "same")),
)
