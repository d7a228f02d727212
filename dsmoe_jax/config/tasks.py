"""Tasks: labels of whole documents, by which a router may choose (`model.moe.router.tasks`).

The label of a document is the domain of its corpus.  A task's name stands for the domain of that
name and for all whose names go on behind it after an underscore: `en` for `en_news` and `en_drama`.
"""

from __future__ import annotations

from collections.abc import Sequence


def task_of(name: str, tasks: Sequence[str]) -> int | None:
    """The number of the task that a domain belongs to; None if there is none.

    Of several the longest name counts: `en_news` is of `en_news` before it is of `en`.
    """
    fits = [task for task in tasks if name == task or name.startswith(f"{task}_")]
    return tasks.index(max(fits, key=len)) if fits else None


def numbers_of(domains: Sequence[str], tasks: Sequence[str]) -> list[int]:
    """The number of each domain's task.

    Raises:
      ValueError: naming the domains that are of no task.
    """
    found = [task_of(domain, tasks) for domain in domains]
    strangers = [domain for domain, task in zip(domains, found, strict=True) if task is None]
    if strangers:
        raise ValueError(
            f"model.moe.router.tasks={tuple(tasks)}: the text has the domains"
            f" {', '.join(strangers)}, which are of no task; each must be one, or begin with one"
            " and an underscore (evaluate --as_task=NAME takes all text to be of one)"
        )
    return [task for task in found if task is not None]
