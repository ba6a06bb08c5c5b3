"""The text put to the model: a question in a template, with its options if it has some."""

from collections.abc import Sequence
from string import Formatter, ascii_uppercase

from lightning.pytorch.utilities.exceptions import MisconfigurationException

_PARTS = ("question", "choices", "hint")
_WITH_CHOICES = "{hint}\n{question}\n{choices}\nAnswer with the letter of the right choice."


class Prompt:
    """Put a text around a question.

    A line whose parts are all empty, such as that of a hint in a row without one, is left out.

    Args:
        template: a text with {question}, and optionally {choices} and {hint}; None is only the question or, with
            choices, the hint, the question, each choice on a line, and how to answer.
        separator: text between two choices.

    Raises:
        MisconfigurationException: the text lacks the question, or names something else in braces.

    Example:
        >>> Prompt("{question} {choices}", ", ")("Which is larger?", ["a mouse", "a horse"])
        'Which is larger? A. a mouse, B. a horse'
        >>> Prompt()("Which is larger?", ["a mouse", "a horse"], "Look.").splitlines()[:3]
        ['Look.', 'Which is larger?', 'A. a mouse']
    """

    def __init__(self, template: str | None = None, separator: str = "\n") -> None:
        self.template, self.separator = template, separator
        try:
            is_fit = template is None or {"question"} <= _named(template) <= set(_PARTS)
        except ValueError:  # a brace without another
            is_fit = False
        if not is_fit:
            raise MisconfigurationException(
                f"prompt={template!r} must hold {{question}}, may hold {{choices}} and {{hint}}, and no other name in "
                "braces. Double all other braces"
            )

    def __call__(self, question: str, choices: Sequence[str] = (), hint: str = "") -> str:
        """Return the text for a question with these options, each with its letter."""
        template = self.template
        if template is None:
            template = _WITH_CHOICES if choices else "{question}"
        options = [f"{ascii_uppercase[number]}. {choice}" for number, choice in enumerate(choices)]
        parts = {"question": question, "choices": self.separator.join(options), "hint": hint.strip()}
        lines = []
        for line in template.split("\n"):
            named = _named(line)
            # A line without a part is the writer's own text, and stays even if it is empty.
            if not named or any(parts[name] for name in named):
                lines.append(line.format(**parts))
        return "\n".join(lines).strip()


def _named(template: str) -> set[str]:
    """Return the names in braces."""
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}
