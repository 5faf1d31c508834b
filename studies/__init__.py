"""Does learning a reward help, where, by how much and at what cost? See ``docs/study.md``.

    python -m studies run studies/open_answers.yaml --out runs/study --jobs 2
    python -m studies report runs/study

A study is a YAML file: a hypothesis, a task, the methods with the values each may choose from, and
seeds. Every method starts from the same model, sees the same demonstrations and takes as many
steps on them; each chooses its settings on a validation split, by the same number of trials, and
the test split is looked at once. Everything runs through ``megatron-irl``'s own commands.
"""
